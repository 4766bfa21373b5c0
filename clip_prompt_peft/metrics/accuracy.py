"""Share of images that are classified correctly."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """
    Share of predictions that equal their reference, as `evaluate.load("accuracy")`, which needs the Hub.

    Example:

    ```py
    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images that are classified correctly.",
            citation="",
            inputs_description="predictions, references: one class index for each image.",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
