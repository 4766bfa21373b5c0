"""Accuracy of each class, averaged over the classes."""

import datasets
import evaluate
import numpy as np


class MeanClassAccuracy(evaluate.Metric):
    """
    Mean over the classes of the share of their images that are classified correctly.

    Every class counts the same, however many images it has; also called mean per-class recall or balanced accuracy.
    Classes without images are not counted.

    Example:

    ```py
    >>> MeanClassAccuracy().compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])
    {'mean_class_accuracy': 0.5}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of each class, averaged over the classes.",
            citation="",
            inputs_description="predictions, references: one class index for each image.",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        is_correct = predictions == references
        accuracies = [is_correct[references == label].mean() for label in np.unique(references)]
        return {"mean_class_accuracy": float(np.mean(accuracies))}
