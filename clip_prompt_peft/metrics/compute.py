"""What the Trainer calls after an evaluation."""

from __future__ import annotations

from transformers import EvalPrediction

from .accuracy import Accuracy
from .mean_class_accuracy import MeanClassAccuracy


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and mean class accuracy, for `Trainer(compute_metrics=compute_metrics)`.

    Args:
        prediction: `predictions` (N, C) logits and `label_ids` (N,).

    Returns:
        `accuracy` and `mean_class_accuracy`, between 0 and 1.
    """
    labels = {"predictions": prediction.predictions.argmax(axis=-1), "references": prediction.label_ids}
    metrics = {}
    for metric in (Accuracy, MeanClassAccuracy):
        # in memory: several processes may get here at the same time, and cache files would be shared
        metrics |= metric(keep_in_memory=True).compute(**labels)
    return metrics
