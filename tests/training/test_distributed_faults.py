"""Tests of what happens if a process fails, and of ways to distribute that do not work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dying_process
import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


@pytest.mark.slow
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
