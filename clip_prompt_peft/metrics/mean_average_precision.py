"""Average precision of each class, averaged over the classes: for images with several labels."""

import datasets
import evaluate
import numpy as np


class MeanAveragePrecision(evaluate.Metric):
    """
    Mean over the classes of the area under the steps of the precision-recall curve.

    As `sklearn.metrics.average_precision_score(references, predictions, average="macro")`, but classes without
    positive images are not counted (where scikit-learn warns and counts 0).

    Example:

    ```py
    >>> MeanAveragePrecision().compute(predictions=[[0.9], [0.8], [0.1]], references=[[1], [0], [1]])
    {'mean_average_precision': 0.8333333333333333}  # (1 + 2 / 3) / 2
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Average precision of each class, averaged over the classes.",
            citation="",
            inputs_description="predictions: (N, C) scores. references: (N, C), 1 where the class is in the image.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references):
        scores, present = np.asarray(predictions), np.asarray(references) > 0  # (N, C) both
        precisions = [
            _average_precision(scores[:, label], present[:, label])
            for label in range(scores.shape[1])
            if present[:, label].any()
        ]
        if not precisions:
            raise ValueError("No image has any label, so there is no average precision.")
        return {"mean_average_precision": float(np.mean(precisions))}


def _average_precision(scores, present):
    order = np.argsort(-scores, kind="stable")
    scores, present = scores[order], present[order]
    found = np.cumsum(present)
    is_last = np.append(scores[1:] != scores[:-1], True)  # equal scores are one step of the curve
    found, ranks = found[is_last], np.arange(1, len(scores) + 1)[is_last]
    gained = np.diff(found, prepend=0)
    return np.sum(gained * found / ranks) / found[-1]
