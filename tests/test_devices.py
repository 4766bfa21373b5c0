"""The suite runs on the CPU, with or without a card in the machine; only tests/gpu sees one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import GPU_TESTS_DEVICE, ROOT
from transformers import TrainingArguments


# A program for users takes a card if there is one, and tests that run it have none.
ASKING = {"examples/run_prompt_tuning.py"}

pytestmark = pytest.mark.skipif(GPU_TESTS_DEVICE is not None, reason="a run of tests/gpu")


def test_no_card_is_seen_here_or_in_processes_that_tests_start(tmp_path):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    show = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    assert subprocess.run(show, capture_output=True, text=True).stdout.strip() == "''"


def test_the_trainer_computes_on_the_cpu_by_itself(tmp_path):
    assert TrainingArguments(str(tmp_path)).device.type == "cpu"


@pytest.mark.slow
def test_with_a_card_in_the_machine_models_are_loaded_used_and_served_where_they_are():
    tests = [
        "test_adapters_of_earlier_versions.py",
        "test_auto.py::TestLoading",
        "test_modeling.py::TestClassNames",
        "commands/test_serve.py::test_adapters_are_listed_loaded_and_unloaded_at_run_time",
    ]
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "card_in_sight"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / test) for test in tests)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_nothing_but_programs_for_users_asks_whether_there_is_a_card():
    folders = ("clip_prompt_peft", "examples", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    asking = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if re.search(r"cuda\.is_available\(|is_torch_cuda_available\(|get_default_device\(", file.read_text("utf-8"))
    }
    asking = {name for name in asking if not name.startswith(("tests/conftest", "tests/test_devices"))}
    assert asking == ASKING
