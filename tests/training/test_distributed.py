"""Tests that several processes give the results of one. `tests/helpers/distributed_matrix.py` runs more cases."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import dying_process
import pytest
import torch.distributed as dist
from distributed_cases import Case, alone, replayed, run_processes
from launching import accelerate_launch, torchrun
from torch.distributed.fsdp import fully_shard


# Starting the processes takes most of the time, so each launch runs all of these cases.
CASES = [
    "coop/even/all",
    "coop/accumulation/shares",
    "coop-csc/uneven/all",
    "cocoop/uneven-accumulation/shares",
    "kgcoop/dispatch/shares",
    "ivlp+prograd/accumulation/all",
    "ivlp+prograd/even_batches=False/shares",
    "maple/even_batches=False-accumulation/all",
    "promptsrc/accumulation/shares",
]


@pytest.fixture(scope="module")
def alone_once(tmp_path_factory):
    return functools.cache(lambda method: alone(Case(method, "even", False), tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("launcher", [accelerate_launch(2), torchrun(3)], ids=["accelerate_2", "torchrun_3"])
def test_several_processes_give_the_losses_and_tensors_of_one(launcher, alone_once, tmp_path):
    ranks = run_processes(launcher, tmp_path, CASES, timeout=300)
    assert len(ranks) == (2 if "accelerate" in launcher else 3)
    for name in CASES:
        case, found = Case.named(name), [of_rank[name] for of_rank in ranks]
        expected = alone_once(case.method) if case.is_even else replayed(case, tmp_path, found)
        for result in found:
            assert result.difference(expected) < 1e-5, name


def test_a_process_that_dies_or_hangs_stops_the_others_with_an_error():
    ways = ["killed", "stands still"]
    done = subprocess.run(
        [sys.executable, dying_process.__file__, "5", *ways],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(ways)
    for way, others in results.items():
        for end in others:
            assert end["exit code"] == 1, (way, end)  # None if it hangs
            assert "Error" in end["last line"], (way, end)


def test_fsdp2_cannot_shard_a_clip(classifier, tmp_path):
    dist.init_process_group("gloo", init_method=Path(tmp_path, "store").as_uri(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match="parameters. Change logit_scale to a 1D tensor"):
            fully_shard(classifier, mesh=mesh)
    finally:
        dist.destroy_process_group()
