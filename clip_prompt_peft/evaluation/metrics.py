"""Share of images that are classified correctly."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


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


class ExpectedCalibrationError(evaluate.Metric):
    """
    Mean distance between confidence and accuracy, over bins of predictions of like confidence.

    The confidence is the probability of the predicted class; the bins are equally wide and weigh as much as they hold
    (https://arxiv.org/abs/1706.04599, equation 3).

    Example:

    ```py
    >>> ExpectedCalibrationError().compute(predictions=[[0.9, 0.1], [0.3, 0.7]], references=[0, 0])  # (0.1 + 0.7) / 2
    {'expected_calibration_error': 0.39999999999999997}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean distance between confidence and accuracy, over bins of predictions of like confidence.",
            citation="",
            inputs_description="predictions: (N, C) probabilities. references: (N,) class indices. num_bins: 15.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, num_bins=15):
        probabilities, references = np.asarray(predictions), np.asarray(references)  # (N, C), (N,)
        if num_bins < 1:
            raise ValueError(f"num_bins must be 1 or more, got {num_bins}.")
        if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
            raise ValueError("Calibration is about probabilities from 0 to 1; apply a softmax to logits first.")
        confidence = probabilities.max(axis=1)
        is_correct = probabilities.argmax(axis=1) == references
        bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
        gaps = np.bincount(bins, weights=is_correct - confidence, minlength=num_bins)  # summed over each bin
        return {"expected_calibration_error": float(np.abs(gaps).sum() / len(references))}


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


def harmonic_mean(base: float, new: float) -> float:
    """H of base-to-new generalisation: `2 base new / (base + new)`, 0 if both are 0.

    As the field reports it (https://arxiv.org/abs/2203.05557): over several data sets, take the harmonic mean of the
    two averages, not the average of harmonic means.

    Raises:
        ValueError: a negative value.
    """
    if base < 0 or new < 0:
        raise ValueError(f"Accuracies are 0 or more, got {base} and {new}.")
    return 2 * base * new / (base + new) if base + new else 0.0


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
