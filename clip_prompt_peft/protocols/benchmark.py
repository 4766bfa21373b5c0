"""Runs the protocols and skips the runs that already have results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from datasets import DatasetDict
from transformers.utils import logging

from ..data import base_new_names
from ..data.columns import LABEL
from ..evaluation.comparison import Answers
from .image_set import ImagePool, ImageSet
from .methods import Backbone, find_method
from .results import Results
from .runs import ALL, BASE, NEW, Run, merge_runs


TRAIN, TEST = "train", "test"


class Benchmark:
    """
    Trains and tests methods on a CLIP and several data sets.

    Args:
        load_backbone (`Callable[[], Backbone]`):
            Loads the CLIP. It is called only if a run has to be done.
        datasets (`Mapping[str, DatasetDict]`):
            The data sets by name, each with the splits `train` and `test` and the columns `image` and `label`.
        results (`Results`):
            The existing results, to which new ones are added.

    Example:

    ```py
    >>> settings = TrainingSettings()
    >>> results = Results("outputs/benchmark", settings.fingerprint("tiny_clip"))
    >>> benchmark = Benchmark(lambda: Backbone(model, image_processor, settings), {"pets": pets}, results)
    >>> benchmark.run(few_shot_curve("pets", ["zero-shot", "linear-probe", "prompt-tuning"]))
    ```
    """

    def __init__(
        self, load_backbone: Callable[[], Backbone], datasets: Mapping[str, DatasetDict], results: Results
    ) -> None:
        self._load_backbone = load_backbone
        self.results = results
        self._pools = {
            (name, split): ImagePool(splits[split])
            for name, splits in datasets.items()
            for split in (TRAIN, TEST)
            if split in splits
        }

    @cached_property
    def backbone(self) -> Backbone:
        return self._load_backbone()

    def run(self, runs: Sequence[Run]) -> None:
        """Does the runs that have no results yet.

        Raises:
            ValueError: If a data set or split does not exist. This is checked before the first run.
        """
        runs = merge_runs(runs)
        for run in runs:
            self._pool(run.source, TRAIN)
            for test in run.tests:
                self._pool(run.source if run.classes == BASE else test, TEST)
        to_do = [run for run in runs if self.results.missing_tests(run)]
        with logging.tqdm(total=len(runs), initial=len(runs) - len(to_do), desc="Runs") as progress:
            for run in to_do:
                progress.set_postfix_str(f"{run.method}, {run.classes} classes, {run.shots} shots, seed {run.seed}")
                self._do(run)
                progress.update()

    def test_set(self, run: Run, test: str) -> ImageSet:
        """Returns the images of one of the tests of a run."""
        if run.classes == BASE and test in (BASE, NEW):
            pool = self._pool(run.source, TEST)
            return pool.classes(_halves(pool)[test])
        return self._pool(test, TEST).classes()

    def _train_set(self, run: Run) -> ImageSet:
        pool = self._pool(run.source, TRAIN)
        label_names = None if run.classes == ALL else _halves(pool)[BASE]
        if not run.shots:
            return pool.classes(label_names)
        return pool.few_shot(run.shots, run.seed, self.backbone.settings.when_fewer, label_names)

    def _do(self, run: Run) -> None:
        start = time.perf_counter()
        metrics = {}
        with find_method(run.method).fit(self.backbone, self._train_set(run), run.seed) as fitted:
            for test in self.results.missing_tests(run):
                images = self.test_set(run, test)
                logits = fitted.score(images)  # (N, C)
                if logits is None:
                    metrics[test] = None
                    continue
                answers = Answers(logits, np.asarray(images.labels), images.class_names)
                self.results.save_predictions(run, test, answers)
                metrics[test] = answers.metrics
        seconds = time.perf_counter() - start
        self.results.add(run, metrics, seconds, fitted.num_trainable, fitted.num_bytes)

    def _pool(self, name: str, split: str) -> ImagePool:
        if (name, split) not in self._pools:
            known = ", ".join(f"{name} ({split})" for name, split in self._pools)
            raise ValueError(f"There is no data set {name!r} with a split {split!r}; there are {known}.")
        return self._pools[name, split]


def _halves(pool: ImagePool) -> dict[str, list[str]]:
    base, new = base_new_names(pool.dataset.features[LABEL].names)
    return {BASE: base, NEW: new}
