"""Tests that several processes give the results of one. `tests/helpers/distributed_matrix.py` runs more cases."""

import functools

import pytest
from distributed_cases import Case, alone, replayed, run_processes
from launching import accelerate_launch, torchrun


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


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [accelerate_launch(2), torchrun(3)], ids=["accelerate_2", "torchrun_3"])
def test_several_processes_give_the_losses_and_tensors_of_one(launcher, alone_once, tmp_path):
    ranks = run_processes(launcher, tmp_path, CASES, timeout=300)
    assert len(ranks) == (2 if "accelerate" in launcher else 3)
    for name in CASES:
        case, found = Case.named(name), [of_rank[name] for of_rank in ranks]
        expected = alone_once(case.method) if case.is_even else replayed(case, tmp_path, found)
        for result in found:
            assert result.difference(expected) < 1e-5, name
