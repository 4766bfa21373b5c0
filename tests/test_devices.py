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
