"""The table that the examples print: the zero-shot model beside the tuned ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.tables import aligned


COLUMNS = {"accuracy": "accuracy", "mean_class_accuracy": "class mean"}


Results = Mapping[str, Mapping[str, float]]  # test set -> metric -> value from 0 to 1


def results_table(zero_shot: Results, tuned: Sequence[Results]) -> str:
    """A table in percent, one row for each test set.

    Args:
        zero_shot: results of the model without adapter.
        tuned: results of every adapter; with several, mean and (population) standard deviation are shown.
    """
    rows = [["test images", *(f"{name}, {kind}" for name in COLUMNS.values() for kind in ("zero-shot", "tuned"))]]
    for test_set, before in zero_shot.items():
        row = [test_set]
        for metric in COLUMNS:
            row += [_percent([before[metric]]), _percent([run[test_set][metric] for run in tuned])]
        rows.append(row)
    return aligned(rows)


def _percent(values: Sequence[float]) -> str:
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
