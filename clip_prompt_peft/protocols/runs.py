"""What the protocols train and test: one run for each method, number of shots and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .methods import find_method


ALL, BASE, NEW = "all", "base", "new"


@dataclass(frozen=True)
class Run:
    """
    One training and what it is tested on.

    Attributes:
        method: name of a method, see [`find_method`].
        source: the data set that is trained on.
        classes: `"all"` or only the `"base"` classes of it.
        shots: images per class; 0 for methods without training.
        seed: of the draw and of the training; 0 for methods without training.
        tests: data sets whose test images are classified; `"base"` and `"new"` are those of the source's classes.
    """

    method: str
    source: str
    classes: str
    shots: int
    seed: int
    tests: tuple[str, ...]

    @property
    def key(self) -> tuple:
        """What the training depends on, settings aside."""
        return self.method, self.source, self.classes, self.shots, self.seed


def few_shot_curve(
    source: str,
    methods: Sequence[str],
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
) -> list[Run]:
    """Accuracy on all classes of one data set, against the number of training images per class."""
    return transfer(source, (), methods, shots, seeds)


def transfer(
    source: str,
    targets: Sequence[str],
    methods: Sequence[str],
    shots: Sequence[int] = (16,),
    seeds: Sequence[int] = (1, 2, 3),
) -> list[Run]:
    """Trained on one data set, tested on it and on others.

    Others with other classes make it the cross-data-set protocol, the same classes in another style that of domain
    generalisation.
    """
    return _runs(methods, source, ALL, shots, seeds, (source, *targets))


def base_to_new(
    source: str, methods: Sequence[str], shots: Sequence[int] = (16,), seeds: Sequence[int] = (1, 2, 3)
) -> list[Run]:
    """Trained on the first half of the classes, tested on either half, see [`split_base_new`]."""
    return _runs(methods, source, BASE, shots, seeds, (BASE, NEW))


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Runs that train the same become one, with the tests of all."""
    merged: dict[tuple, Run] = {}
    for run in runs:
        known = merged.get(run.key)
        tests = run.tests if known is None else tuple(dict.fromkeys(known.tests + run.tests))
        merged[run.key] = replace(run, tests=tests)
    return list(merged.values())


def _runs(methods, source, classes, shots, seeds, tests) -> list[Run]:
    runs = []
    for method in methods:
        if find_method(method).is_trained:
            runs += [Run(method, source, classes, k, seed, tests) for k in shots for seed in seeds]
        else:
            runs.append(Run(method, source, classes, 0, 0, tests))
    return runs
