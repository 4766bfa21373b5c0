"""How far the confidence of predictions is from their accuracy."""

import datasets
import evaluate
import numpy as np


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
