"""Two processes train to what one process trains to."""

import json
import os
import subprocess
import sys

import pytest
import train_worker
from safetensors.torch import load_file
from torch.testing import assert_close


# `accelerate launch --cpu --num_processes 2` starts a single process unless MPI is there, in spite of its name;
# --multi_gpu is what makes it start two. The workers themselves ask for the CPU.
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
ACCELERATE = f"{ACCELERATE} --dynamo_backend no --main_process_port 0"
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"


def results_in(folder):
    return json.loads((folder / "result.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train_worker.train(str(folder), batch_size=8, accumulation_steps=1, find_unused_parameters=False)
    return results_in(folder)


@pytest.mark.parametrize(
    ("launcher", "batch_size", "accumulation_steps", "find_unused_parameters"),
    [(TORCHRUN, 4, 1, False), (ACCELERATE, 2, 2, True)],
    ids=["torchrun", "accelerate_with_accumulation_and_search_for_unused"],
)
def test_two_processes_give_the_losses_and_vectors_of_one(
    alone, tmp_path, launcher, batch_size, accumulation_steps, find_unused_parameters
):
    worker = [train_worker.__file__, str(tmp_path), str(batch_size), str(accumulation_steps)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), *worker, str(int(find_unused_parameters))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result, vectors), (expected, expected_vectors) = results_in(tmp_path), alone
    assert result["num_processes"] == 2
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert_close(vectors, expected_vectors, rtol=0, atol=1e-5)
