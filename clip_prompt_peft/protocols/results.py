"""Finished runs in a file, a json line each, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluation import metrics as harmonic_mean
from .runs import BASE, NEW, Run


Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Predictions:
    """
    What was answered about each test image.

    Attributes:
        labels: (N,)
        predicted: (N,)
        confidence: (N,) probability of the predicted class.
        class_names: of labels and predictions.
    """

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    class_names: list[str]


class Results:
    """
    The results of a folder: `results.jsonl`, and `predictions/` beside it.

    A line is written in one piece when its run is finished. One that was cut off when a process was killed is taken
    out when the file is opened, and its run counts as not done.

    Args:
        folder: made if need be.
        fingerprint: of the settings; lines under another one stay in the file and are not looked at.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.path = self.folder / "results.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics: dict[tuple, Metrics | None] = {}  # by run and test
        for line in self._read():
            self._remember(line)

    def missing_tests(self, run: Run) -> tuple[str, ...]:
        """Those tests of the run that have no result yet."""
        return tuple(test for test in run.tests if (*run.key, test) not in self._metrics)

    def metrics(self, run: Run, test: str) -> Metrics | None:
        """Of one test; `None` if it was not done, or if the method cannot know the classes."""
        return self._metrics.get((*run.key, test))

    def add(self, run: Run, metrics: Mapping[str, Metrics | None], seconds: float) -> None:
        """Writes down a finished run: metrics by test."""
        method, source, classes, shots, seed = run.key
        line = {
            "method": method,
            "source": source,
            "classes": classes,
            "shots": shots,
            "seed": seed,
            "settings": self.fingerprint,
            "seconds": round(seconds, 2),
            "tests": dict(metrics),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(line)

    def save_predictions(self, run: Run, test: str, predictions: Predictions) -> None:
        """To be called before `add`, so that every finished run has its predictions."""
        path = self._predictions_path(run, test)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                labels=predictions.labels,
                predicted=predictions.predicted,
                confidence=predictions.confidence,
                class_names=np.array(predictions.class_names),
            )
        unfinished.replace(path)

    def predictions(self, run: Run, test: str) -> Predictions:
        """Raises `OSError` if the run was not tested on it."""
        with np.load(self._predictions_path(run, test)) as saved:
            return Predictions(
                saved["labels"], saved["predicted"], saved["confidence"], [str(name) for name in saved["class_names"]]
            )

    def _predictions_path(self, run: Run, test: str) -> Path:
        name = "_".join(str(part).replace(os.sep, "-") for part in (*run.key, test))
        return self.folder / "predictions" / f"{self.fingerprint}_{name}.npz"

    def _read(self) -> Iterable[dict]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            unfinished = self.path.with_suffix(".part")
            unfinished.write_bytes(whole)
            unfinished.replace(self.path)
        return map(json.loads, whole.splitlines())

    def _remember(self, line: dict) -> None:
        if line["settings"] != self.fingerprint:
            return
        key = tuple(line[name] for name in ("method", "source", "classes", "shots", "seed"))
        for test, metrics in line["tests"].items():
            self._metrics[(*key, test)] = metrics


UNKNOWN = "–"  # a method that cannot know the classes


FewShotScores = dict[str, dict[int, list[float]]]  # method -> shots -> one value for each seed


TestScores = dict[str, dict[str, list[float]]]  # method -> test -> one value for each seed


def few_shot_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> FewShotScores:
    """What the runs, of a few-shot curve, reached on the data set they were trained on."""
    scores: FewShotScores = {}
    for run in runs:
        metrics = results.metrics(run, run.source)
        if metrics is not None:
            scores.setdefault(run.method, {}).setdefault(run.shots, []).append(metrics[metric])
    return scores


def scores_by_test(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> TestScores:
    """What the runs, of one number of shots, reached on each of their tests."""
    scores: TestScores = {}
    for run in runs:
        for test in run.tests:
            metrics = results.metrics(run, test)
            values = scores.setdefault(run.method, {}).setdefault(test, [])
            if metrics is not None:
                values.append(metrics[metric])
    return scores


def base_new_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> dict[str, dict[str, float]]:
    """Means over seeds, on base and new classes, and their harmonic mean `"H"`, if the method knows new classes."""
    means = mean_scores(results, runs, metric)
    for tests in means.values():
        if {BASE, NEW} <= set(tests):
            tests["H"] = harmonic_mean(tests[BASE], tests[NEW])
    return means


def mean_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> dict[str, dict[str, float]]:
    """Method to test to the mean over seeds; tests that a method cannot know are left out."""
    return {
        method: {test: float(np.mean(values)) for test, values in tests.items() if values}
        for method, tests in scores_by_test(results, runs, metric).items()
    }


def few_shot_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """A row for each method, a column for each number of shots."""
    scores = few_shot_scores(results, runs, metric)
    shots = sorted({k for by_shots in scores.values() for k in by_shots})
    header = ["method", *("no training" if k == 0 else f"{k} shot{'s' if k > 1 else ''}" for k in shots)]
    rows = [[method, *(percent(by_shots.get(k)) for k in shots)] for method, by_shots in scores.items()]
    return markdown([header, *([cell if cell != UNKNOWN else "" for cell in row] for row in rows)])


def base_new_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """A row for each method: base classes, new classes, and the harmonic mean of the two means."""
    scores, means = scores_by_test(results, runs, metric), base_new_scores(results, runs, metric)
    rows = [["method", BASE, NEW, "H"]]
    for method, tests in scores.items():
        harmonic = [means[method]["H"]] if "H" in means[method] else None
        rows.append([method, percent(tests[BASE]), percent(tests[NEW]), percent(harmonic)])
    return markdown(rows)


def transfer_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """A row for each method: the source, every target, and the mean over the targets."""
    scores = scores_by_test(results, runs, metric)
    source, *targets = runs[0].tests
    rows = [["method", f"{source} (source)", *targets, "mean of targets"]]
    for method, tests in scores.items():
        by_target = [tests[target] for target in targets]
        is_known = targets and all(by_target)
        mean = np.mean(by_target, axis=0).tolist() if is_known else None
        rows.append([method, *(percent(tests[test]) for test in (source, *targets)), percent(mean)])
    return markdown(rows)


def percent(values: Sequence[float] | None) -> str:
    """Mean and, of several, (population) standard deviation of shares, in percent."""
    if not values:
        return UNKNOWN
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; columns are padded, so that it can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
