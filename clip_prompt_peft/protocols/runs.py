"""The runs of each protocol: one for each method, number of shots and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .methods import find_method


ALL, BASE, NEW = "all", "base", "new"
KEY = ("method", "source", "classes", "shots", "seed")


@dataclass(frozen=True)
class Run:
    """
    One training and the test sets it is evaluated on.

    Attributes:
        method (`str`):
            The name of the method, see [`find_method`].
        source (`str`):
            The name of the data set to train on.
        classes (`str`):
            Whether to train on `"all"` classes of the source or only on its `"base"` classes.
        shots (`int`):
            The number of training images per class, or 0 for a method without training.
        seed (`int`):
            The seed of the few-shot sample and of the training, or 0 for a method without training.
        tests (`tuple[str, ...]`):
            The names of the data sets to test on. If `classes` is `"base"`, they are `"base"` and `"new"`, the two
            halves of the classes of the source.
    """

    method: str
    source: str
    classes: str
    shots: int
    seed: int
    tests: tuple[str, ...]

    @property
    def key(self) -> tuple:
        """The values of the fields that the training depends on, in the order of `KEY`."""
        return tuple(getattr(self, name) for name in KEY)


def few_shot_curve(
    source: str,
    methods: Sequence[str],
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
) -> list[Run]:
    """Returns the runs that train and test on all classes of one data set, for several numbers of shots."""
    return transfer(source, (), methods, shots, seeds)


def transfer(
    source: str,
    targets: Sequence[str],
    methods: Sequence[str],
    shots: Sequence[int] = (16,),
    seeds: Sequence[int] = (1, 2, 3),
) -> list[Run]:
    """Returns the runs that train on one data set and test on it and on others.

    This is the cross-dataset protocol if the targets have other classes, and domain generalization if they have the
    same classes in another style.
    """
    return _runs(methods, source, ALL, shots, seeds, (source, *targets))


def base_to_new(
    source: str, methods: Sequence[str], shots: Sequence[int] = (16,), seeds: Sequence[int] = (1, 2, 3)
) -> list[Run]:
    """Returns the runs that train on the first half of the classes and test on both, see [`split_base_new`]."""
    return _runs(methods, source, BASE, shots, seeds, (BASE, NEW))


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Merges runs with the same training into one run with all of their tests."""
    merged: dict[tuple, Run] = {}
    for run in runs:
        known = merged.get(run.key, run)
        merged[run.key] = replace(run, tests=tuple(dict.fromkeys(known.tests + run.tests)))
    return list(merged.values())


def _runs(methods, source, classes, shots, seeds, tests) -> list[Run]:
    runs = []
    for method in methods:
        if find_method(method).is_trained:
            runs += [Run(method, source, classes, k, seed, tests) for k in shots for seed in seeds]
        else:
            runs.append(Run(method, source, classes, 0, 0, tests))
    return runs
