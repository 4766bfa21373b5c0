"""F1 of each class, averaged over the classes."""

import datasets
import evaluate
import numpy as np


class MacroF1(evaluate.Metric):
    """
    Mean over the classes of the harmonic mean of precision and recall.

    Classes without images are not counted, as in Dassl's evaluator:
    `sklearn.metrics.f1_score(references, predictions, average="macro", labels=np.unique(references))`.

    Example:

    ```py
    >>> MacroF1().compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])  # (6 / 7 + 0) / 2
    {'macro_f1': 0.42857142857142855}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="F1 of each class, averaged over the classes.",
            citation="",
            inputs_description="predictions, references: one class index for each image.",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        f1 = []
        for label in np.unique(references):
            predicted, present = predictions == label, references == label
            f1.append(2 * np.sum(predicted & present) / (predicted.sum() + present.sum()))
        return {"macro_f1": float(np.mean(f1))}
