"""What the Trainer calls after an evaluation."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction

from .accuracy import Accuracy
from .expected_calibration_error import ExpectedCalibrationError
from .macro_f1 import MacroF1
from .mean_average_precision import MeanAveragePrecision
from .mean_class_accuracy import MeanClassAccuracy
from .top_k_accuracy import TopKAccuracy


TOP_K = 5


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """All metrics of single-label classification, for `Trainer(compute_metrics=compute_metrics)`.

    Args:
        prediction: `predictions` (N, C) logits and `label_ids` (N,).

    Returns:
        `accuracy`, `mean_class_accuracy`, `macro_f1`, `expected_calibration_error` and, of more than 5 classes,
        `top5_accuracy`, between 0 and 1.
    """
    logits, references = np.asarray(prediction.predictions, dtype=np.float64), prediction.label_ids  # (N, C), (N,)
    metrics = {}
    for metric in (Accuracy, MeanClassAccuracy, MacroF1):
        metrics |= _compute(metric, logits.argmax(axis=-1), references)
    metrics |= _compute(ExpectedCalibrationError, softmax(logits), references)
    if logits.shape[-1] > TOP_K:
        metrics |= _compute(TopKAccuracy, logits, references, k=TOP_K)
    return metrics


def compute_multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`mean_average_precision`, for a classifier with `problem_type="multi_label_classification"`.

    Args:
        prediction: `predictions` (N, C) logits and `label_ids` (N, C), 1 where the class is in the image.
    """
    return _compute(MeanAveragePrecision, prediction.predictions, prediction.label_ids.astype(int))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) logits to (N, C) probabilities."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _compute(metric, predictions, references, **settings) -> dict[str, float]:
    # in memory: several processes may get here at the same time, and cache files would be shared
    return metric(keep_in_memory=True).compute(predictions=predictions, references=references, **settings)
