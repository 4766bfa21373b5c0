"""Processes that each encode a share of the classes train to what one process trains to."""

import json
import math
import os
import subprocess
import sys

import pytest
import sharding_worker
import torch
from launching import accelerate_launch, torchrun
from safetensors.torch import load_file
from torch.testing import assert_close


pytestmark = pytest.mark.slow  # starts processes


LAUNCHERS = {2: accelerate_launch(2), 3: torchrun(3)}


@pytest.fixture(scope="module", params=LAUNCHERS)
def results(request, tmp_path_factory):
    """Number of processes, and what each of them left: trained tensors, and counts of classes."""
    folder = tmp_path_factory.mktemp("sharding")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[request.param].split(), sharding_worker.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = range(request.param)
    tensors = [load_file(folder / f"{rank}.safetensors") for rank in ranks]
    counts = [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]
    return request.param, tensors, counts


def alone(adapter):
    """What one process trains to, on all images at once, encoding all classes at once."""
    model = sharding_worker.build(adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    embeds, labels = sharding_worker.images(model)
    for _ in range(sharding_worker.NUM_STEPS):
        optimizer.zero_grad()
        model(image_embeds=embeds, labels=labels).loss.backward()
        optimizer.step()
    return sharding_worker.trained(model)


@pytest.mark.parametrize("adapter", ["prompt", "lora"])
def test_all_processes_end_with_the_tensors_of_one(results, adapter):
    _, tensors, _ = results
    expected = alone(adapter)
    names = [name for name, settings in sharding_worker.scenarios() if settings["adapter"] == adapter]
    assert len(names) == 4
    for of_process in tensors:
        for name in names:
            actual = {key.split("/")[1]: value for key, value in of_process.items() if key.startswith(f"{name}/")}
            assert_close(actual, expected, rtol=0, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}")


def test_each_process_encodes_its_share(results):
    num_processes, _, counts = results
    largest_share = math.ceil(len(sharding_worker.NAMES) / num_processes)
    for name, settings in sharding_worker.scenarios():
        found = sorted(count["classes"][name] for count in counts)
        assert found[-1] == min(settings["batch_size"] or largest_share, largest_share)


def test_by_default_many_classes_are_shared_in_training_only(results):
    num_processes, _, counts = results
    assert counts[0]["defaults"] == {
        "few, training": len(sharding_worker.NAMES),
        "few, evaluation": len(sharding_worker.NAMES),
        "many, training": 300 // num_processes,
        "many, evaluation": 100,  # in chunks
    }
