"""Finished runs in a file, a json line each, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .runs import Run


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
