"""Share of images whose class is among the best few."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Share of images whose class has one of the `k` highest scores. Of equal scores, those of the first classes count.

    Example:

    ```py
    >>> TopKAccuracy().compute(predictions=[[0.1, 0.5, 0.4], [0.8, 0.1, 0.1]], references=[2, 2], k=2)
    {'top2_accuracy': 0.5}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images whose class has one of the k highest scores.",
            citation="",
            inputs_description="predictions: (N, C) scores. references: one class index for each image. k: 5.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, k=5):
        scores, references = np.asarray(predictions), np.asarray(references)  # (N, C), (N,)
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N, k)
        return {f"top{k}_accuracy": float(np.mean((best == references[:, None]).any(axis=1)))}
