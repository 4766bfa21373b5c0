"""Classification metrics as `evaluate.Metric` classes, and functions that compute them for the `Trainer`.

All values are between 0 and 1.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from ..labels import IGNORED_LABEL


TOP_K = 5
CLASS_INDEX = datasets.Value("int64")
SCORES = datasets.Sequence(datasets.Value("float64"))  # one per class


class ImageMetric(evaluate.Metric):
    """
    Base class of the metrics in this module.

    Attributes:
        summary (`str`):
            What the metric measures.
        inputs (`str`):
            The arguments of `compute`.
        columns (`dict`):
            The feature types of `predictions` and `references`.
    """

    summary: str
    inputs = "predictions, references: one class index for each image."
    columns = {"predictions": CLASS_INDEX, "references": CLASS_INDEX}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(self.columns),
        )


class Accuracy(ImageMetric):
    """
    Share of the images that are classified correctly, as in `evaluate.load("accuracy")` but without the Hub.

    Example:

    ```py
    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    ```
    """

    summary = "Share of the images that are classified correctly."

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MeanClassAccuracy(ImageMetric):
    """
    Accuracy of each class, averaged over the classes. Also called mean per-class recall or balanced accuracy.

    Every class has the same weight, no matter how many images it has. Classes without images are ignored.

    Example:

    ```py
    >>> MeanClassAccuracy().compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])
    {'mean_class_accuracy': 0.5}
    ```
    """

    summary = "Accuracy of each class, averaged over the classes."

    def _compute(self, predictions, references):
        references = np.asarray(references)
        is_correct = np.asarray(predictions) == references
        accuracies = [is_correct[references == label].mean() for label in np.unique(references)]
        return {"mean_class_accuracy": float(np.mean(accuracies))}


class MacroF1(ImageMetric):
    """
    F1 score (harmonic mean of precision and recall) of each class, averaged over the classes.

    Classes without images are ignored, as in Dassl's evaluator:
    `sklearn.metrics.f1_score(references, predictions, average="macro", labels=np.unique(references))`.

    Example:

    ```py
    >>> MacroF1().compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])  # (6 / 7 + 0) / 2
    {'macro_f1': 0.42857142857142855}
    ```
    """

    summary = "F1 of each class, averaged over the classes."

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        f1 = []
        for label in np.unique(references):
            predicted, present = predictions == label, references == label
            f1.append(2 * np.sum(predicted & present) / (predicted.sum() + present.sum()))
        return {"macro_f1": float(np.mean(f1))}


class TopKAccuracy(ImageMetric):
    """
    Share of the images whose class has one of the `k` highest scores. Ties are won by the class with the lower index.

    Example:

    ```py
    >>> TopKAccuracy().compute(predictions=[[0.1, 0.5, 0.4], [0.8, 0.1, 0.1]], references=[2, 2], k=2)
    {'top2_accuracy': 0.5}
    ```
    """

    summary = "Share of the images whose class has one of the k highest scores."
    inputs = "predictions: (N, C) scores. references: one class index for each image. k: 5."
    columns = {"predictions": SCORES, "references": CLASS_INDEX}

    def _compute(self, predictions, references, k=5):
        scores, references = np.asarray(predictions), np.asarray(references)  # (N, C), (N,)
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N, k)
        return {f"top{k}_accuracy": float(np.mean((best == references[:, None]).any(axis=1)))}


class ExpectedCalibrationError(ImageMetric):
    """
    Mean absolute difference between confidence and accuracy over bins of equal width, weighted by their image counts.

    The confidence is the probability of the predicted class.

    Source: https://arxiv.org/abs/1706.04599, equation 3.

    Example:

    ```py
    >>> ExpectedCalibrationError().compute(predictions=[[0.9, 0.1], [0.3, 0.7]], references=[0, 0])  # (0.1 + 0.7) / 2
    {'expected_calibration_error': 0.39999999999999997}
    ```
    """

    summary = "Mean absolute difference between confidence and accuracy over bins of equal width."
    inputs = "predictions: (N, C) probabilities. references: (N,) class indices. num_bins: 15."
    columns = {"predictions": SCORES, "references": CLASS_INDEX}

    def _compute(self, predictions, references, num_bins=15):
        probabilities, references = np.asarray(predictions), np.asarray(references)  # (N, C), (N,)
        if num_bins < 1:
            raise ValueError(f"num_bins must be 1 or more, got {num_bins}.")
        if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
            raise ValueError("predictions must be probabilities from 0 to 1; apply a softmax to logits first.")
        is_correct = probabilities.argmax(axis=1) == references
        return {"expected_calibration_error": calibration_error(probabilities.max(axis=1), is_correct, num_bins)}


def calibration_error(confidence: np.ndarray, is_correct: np.ndarray, num_bins: int = 15) -> float:
    """Returns the expected calibration error of N predictions from their probabilities and whether they are right."""
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=is_correct - confidence, minlength=num_bins)  # summed over each bin
    return float(np.abs(gaps).sum() / len(confidence))


class MeanAveragePrecision(ImageMetric):
    """
    Average precision of each class, averaged over the classes, for multi-label classification.

    Equal to `sklearn.metrics.average_precision_score(references, predictions, average="macro")`, except that classes
    without positive images are ignored, where scikit-learn warns and counts 0.

    Example:

    ```py
    >>> MeanAveragePrecision().compute(predictions=[[0.9], [0.8], [0.1]], references=[[1], [0], [1]])
    {'mean_average_precision': 0.8333333333333333}  # (1 + 2 / 3) / 2
    ```
    """

    summary = "Average precision of each class, averaged over the classes."
    inputs = "predictions: (N, C) scores. references: (N, C), 1 where the class is in the image."
    columns = {"predictions": SCORES, "references": datasets.Sequence(CLASS_INDEX)}

    def _compute(self, predictions, references):
        scores, present = np.asarray(predictions), np.asarray(references) > 0  # (N, C) both
        labels = np.flatnonzero(present.any(axis=0))
        if not len(labels):
            raise ValueError("No image has any label, so there is no average precision.")
        precisions = [_average_precision(scores[:, label], present[:, label]) for label in labels]
        return {"mean_average_precision": float(np.mean(precisions))}


def _average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    scores, present = scores[order], present[order]
    found = np.cumsum(present)
    is_last = np.append(scores[1:] != scores[:-1], True)  # equal scores are one step of the curve
    found, ranks = found[is_last], np.arange(1, len(scores) + 1)[is_last]
    gained = np.diff(found, prepend=0)
    return np.sum(gained * found / ranks) / found[-1]


def harmonic_mean(base: float, new: float) -> float:
    """Returns H of base-to-new generalization: `2 * base * new / (base + new)`, or 0 if both are 0.

    For several data sets, papers report the harmonic mean of the two averages, not the average of harmonic means.

    Args:
        base (`float`):
            Accuracy on the base classes.
        new (`float`):
            Accuracy on the new classes.

    Raises:
        ValueError: If a value is negative.

    Source: https://arxiv.org/abs/2203.05557
    """
    if base < 0 or new < 0:
        raise ValueError(f"Accuracies must be 0 or more, got {base} and {new}.")
    return 2 * base * new / (base + new) if base + new else 0.0


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Computes all metrics of single-label classification, for `Trainer(compute_metrics=compute_metrics)`.

    Args:
        prediction (`EvalPrediction`):
            The (N, C) logits in `predictions` and the (N,) labels in `label_ids`, or lists of batches of them
            (`eval_do_concat_batches=False`). Images with the label -100, which the loss ignores, are left out. Of a
            tuple of predictions, the first are the logits.

    Returns:
        `dict[str, float]`: `accuracy`, `mean_class_accuracy`, `macro_f1`, `expected_calibration_error` and, with more
        than 5 classes, `top5_accuracy`.

    Raises:
        ValueError: If the logits are of another shape or have NaN, or if no image has a label.
    """
    logits = _logits(prediction).astype(np.float64)  # (N, C)
    references = _concatenated(prediction.label_ids)  # (N,)
    if logits.ndim != 2 or references.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,), got predictions of shape {logits.shape} and label_ids of shape "
            f"{references.shape}."
        )
    is_labeled = references != IGNORED_LABEL
    if not is_labeled.any():
        raise ValueError(f"None of the {len(references)} images has a label (other than {IGNORED_LABEL}).")
    logits, references = logits[is_labeled], references[is_labeled]
    metrics = {}
    for metric in (Accuracy, MeanClassAccuracy, MacroF1):
        metrics |= _compute(metric, logits.argmax(axis=-1), references)
    metrics |= _compute(ExpectedCalibrationError, softmax(logits), references)
    if logits.shape[-1] > TOP_K:
        metrics |= _compute(TopKAccuracy, logits, references, k=TOP_K)
    return metrics


def compute_multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Computes `mean_average_precision`, for a classifier with `problem_type="multi_label_classification"`.

    Args:
        prediction (`EvalPrediction`):
            The (N, C) logits in `predictions`, and `label_ids` of shape (N, C) with 1 where the class is in the image.
    """
    return _compute(
        MeanAveragePrecision,
        _logits(prediction),
        _concatenated(prediction.label_ids).astype(int),
    )


def _logits(prediction: EvalPrediction) -> np.ndarray:
    """Returns the logits among the predictions, which are checked for NaN."""
    values = prediction.predictions
    if isinstance(values, list) and values and isinstance(values[0], tuple):  # batches that are not concatenated
        values = [batch[0] for batch in values]
    logits = _concatenated(values[0] if isinstance(values, tuple) else values)
    rows = np.isnan(logits).reshape(len(logits), -1).any(axis=1) if logits.dtype.kind == "f" else np.zeros(0, bool)
    if rows.any():
        raise ValueError(
            f"The logits of {rows.sum()} of {len(logits)} images have NaN, such as those of image {rows.argmax()}: "
            "the training may have diverged. Train with a lower learning rate or another dtype."
        )
    return logits


def _concatenated(values) -> np.ndarray:
    return np.concatenate(values) if isinstance(values, list) else np.asarray(values)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the (N, C) probabilities of (N, C) logits."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _compute(metric: type[ImageMetric], predictions, references, **settings) -> dict[str, float]:
    # in memory, because processes that evaluate at the same time would share the cache files
    return metric(keep_in_memory=True).compute(predictions=predictions, references=references, **settings)
