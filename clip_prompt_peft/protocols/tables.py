"""Results of runs as tables in Markdown: mean and standard deviation over seeds, in percent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..metrics import harmonic_mean
from .results import Results
from .runs import BASE, NEW, Run


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
