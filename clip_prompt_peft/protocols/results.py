"""The results of finished runs: storage in a file, so that a benchmark can be resumed, and tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..evaluation.comparison import Predictions
from ..evaluation.metrics import harmonic_mean
from ..evaluation.tables import NO_VALUE, markdown_table, percent
from .runs import BASE, KEY, NEW, Run


Metrics = Mapping[str, float]
FewShotScores = dict[str, dict[int, list[float]]]  # method -> shots -> one value for each seed
TestScores = dict[str, dict[str, list[float]]]  # method -> test -> one value for each seed


class Results:
    """
    The results in a folder: one JSON line per run in `results.jsonl`, and the predictions in `predictions/`.

    A line that was only partly written when the process was killed is removed when the file is opened, so that its
    run is done again.

    Args:
        folder (`str` or `os.PathLike`):
            The folder, which is created if it does not exist.
        fingerprint (`str`):
            The result of [`TrainingSettings.fingerprint`]. Lines with another fingerprint are kept but ignored.
        data_hashes (`Mapping[str, str]`, *optional*):
            A hash of the images of each data set by its name. Results on other images under the same name are kept
            but ignored.
    """

    def __init__(
        self, folder: str | os.PathLike, fingerprint: str, data_hashes: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.data_hashes = data_hashes or {}
        self.path = self.folder / "results.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics: dict[tuple, Metrics | None] = {}  # by run key and test
        self._sizes: dict[tuple, tuple[int | None, int | None]] = {}  # by run key
        for line in self._read():
            self._remember(line)

    def missing_tests(self, run: Run) -> tuple[str, ...]:
        """Returns the tests of the run that have no result yet."""
        return tuple(test for test in run.tests if (*run.key, test) not in self._metrics)

    def metrics(self, run: Run, test: str) -> Metrics | None:
        """Returns the metrics of one test, or `None` if it was not done or the method cannot predict its classes."""
        return self._metrics.get((*run.key, test))

    def size(self, run: Run) -> tuple[int | None, int | None]:
        """Returns the number of trained parameters and of bytes of the adapter, or `None` for each that is unknown."""
        return self._sizes.get(run.key, (None, None))

    def add(
        self,
        run: Run,
        metrics: Mapping[str, Metrics | None],
        seconds: float,
        num_trainable: int | None = None,
        num_bytes: int | None = None,
    ) -> None:
        """Appends a finished run to the file.

        Args:
            run (`Run`):
                The run.
            metrics (`Mapping[str, Metrics]`):
                The metrics by test, with `None` for a test whose classes the method cannot predict.
            seconds (`float`):
                The duration of the run.
            num_trainable (`int`, *optional*):
                The number of trained parameters.
            num_bytes (`int`, *optional*):
                The size of the saved adapter in bytes, 0 if there is none.
        """
        line = {
            **dict(zip(KEY, run.key)),
            "settings": self.fingerprint,
            "data": self._hashes([run.source, *metrics]),
            "seconds": round(seconds, 2),
            "num_trainable": num_trainable,
            "num_bytes": num_bytes,
            "tests": dict(metrics),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(line)

    def save_predictions(self, run: Run, test: str, predictions: Predictions) -> None:
        """Saves the predictions of a test. Call it before `add`, so that every finished run has its predictions."""
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
        """Loads the predictions of a test.

        Raises:
            OSError: If there are none.
        """
        with np.load(self._predictions_path(run, test)) as saved:
            return Predictions(saved["labels"], saved["predicted"], saved["confidence"], saved["class_names"].tolist())

    def _predictions_path(self, run: Run, test: str) -> Path:
        hashes = self._hashes([run.source, test]).values()
        name = "_".join(str(part).replace(os.sep, "-") for part in (*run.key, test, *hashes))
        return self.folder / "predictions" / f"{self.fingerprint}_{name}.npz"

    def _hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the hashes of data sets by name. Base and new classes are a part of the source."""
        return {name: self.data_hashes[name] for name in names if name in self.data_hashes}

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
        known = line.get("data", {})  # older files have none
        if known.get(line["source"]) != self.data_hashes.get(line["source"]):
            return
        key = tuple(line[name] for name in KEY)
        self._sizes[key] = line.get("num_trainable"), line.get("num_bytes")  # older files have neither
        for test, metrics in line["tests"].items():
            if known.get(test) == self.data_hashes.get(test):
                self._metrics[(*key, test)] = metrics


def few_shot_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> FewShotScores:
    """Returns the scores of few-shot runs on the data set they were trained on."""
    scores: FewShotScores = {}
    for run in runs:
        metrics = results.metrics(run, run.source)
        if metrics is not None:
            scores.setdefault(run.method, {}).setdefault(run.shots, []).append(metrics[metric])
    return scores


def scores_by_test(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> TestScores:
    """Returns the scores of runs with one number of shots on each of their tests.

    The list of a test is empty if the method cannot predict its classes.
    """
    scores: TestScores = {}
    for run in runs:
        for test in run.tests:
            metrics = results.metrics(run, test)
            values = scores.setdefault(run.method, {}).setdefault(test, [])
            if metrics is not None:
                values.append(metrics[metric])
    return scores


def base_new_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> dict[str, dict[str, float]]:
    """Returns the mean scores on base and new classes and, if both exist, their harmonic mean `"H"`."""
    means = mean_scores(results, runs, metric)
    for tests in means.values():
        if {BASE, NEW} <= set(tests):
            tests["H"] = harmonic_mean(tests[BASE], tests[NEW])
    return means


def mean_scores(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> dict[str, dict[str, float]]:
    """Returns the mean score over seeds for each method and test, without tests that a method cannot predict."""
    return {
        method: {test: float(np.mean(values)) for test, values in tests.items() if values}
        for method, tests in scores_by_test(results, runs, metric).items()
    }


def few_shot_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """Returns a Markdown table with one row for each method and one column for each number of shots."""
    scores = few_shot_scores(results, runs, metric)
    shots = sorted({k for by_shots in scores.values() for k in by_shots})
    rows = [["method", *("no training" if k == 0 else f"{k} shot{'s' if k > 1 else ''}" for k in shots)]]
    for method, by_shots in scores.items():
        rows.append([method, *(percent(by_shots[k]) if k in by_shots else "" for k in shots)])
    return markdown_table(rows)


def base_new_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """Returns a Markdown table with base classes, new classes and the harmonic mean of the two means."""
    scores, means = scores_by_test(results, runs, metric), base_new_scores(results, runs, metric)
    rows = [["method", BASE, NEW, "H"]]
    for method, tests in scores.items():
        harmonic = [means[method]["H"]] if "H" in means[method] else None
        rows.append([method, percent(tests[BASE]), percent(tests[NEW]), percent(harmonic)])
    return markdown_table(rows)


def transfer_table(results: Results, runs: Sequence[Run], metric: str = "accuracy") -> str:
    """Returns a Markdown table with the source, every target and the mean over the targets."""
    source, *targets = runs[0].tests
    rows = [["method", f"{source} (source)", *targets, "mean of targets"]]
    for method, tests in scores_by_test(results, runs, metric).items():
        cells = [percent(tests[test]) for test in (source, *targets)]
        rows.append([method, *cells, percent(_mean_over_tests(tests, targets))])
    return markdown_table(rows)


def methods_table(results: Results, runs: Sequence[Run]) -> str:
    """Returns a Markdown table with the results of transfer runs and the size of each method."""
    source, *others = runs[0].tests
    accuracies, class_means = (scores_by_test(results, runs, name) for name in ("accuracy", "mean_class_accuracy"))
    rows = [["method", "accuracy", "class mean", "other test sets, class mean", "trained", "adapter"]]
    for method, run in {run.method: run for run in runs}.items():
        num_trainable, num_bytes = results.size(run)
        rows.append(
            [
                method,
                percent(accuracies[method][source]),
                percent(class_means[method][source]),
                percent(_mean_over_tests(class_means[method], others)),
                NO_VALUE if num_trainable is None else f"{num_trainable:,}",
                f"{num_bytes / 1024:.1f} KB" if num_bytes else NO_VALUE,
            ]
        )
    return markdown_table(rows)


def _mean_over_tests(scores: Mapping[str, Sequence[float]], tests: Sequence[str]) -> list[float] | None:
    """Returns the mean over `tests` for each seed, or `None` if a test has no scores."""
    by_test = [scores[test] for test in tests]
    return np.mean(by_test, axis=0).tolist() if by_test and all(by_test) else None
