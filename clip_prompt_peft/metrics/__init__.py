"""Metrics of image classification, as `evaluate.Metric`s that need no network.

A metric is one file with one class; `evaluate.load` takes the file's path as well.
"""

from .accuracy import Accuracy
from .compute import compute_metrics, compute_multi_label_metrics, softmax
from .expected_calibration_error import ExpectedCalibrationError
from .harmonic_mean import harmonic_mean
from .macro_f1 import MacroF1
from .mean_average_precision import MeanAveragePrecision
from .mean_class_accuracy import MeanClassAccuracy
from .top_k_accuracy import TopKAccuracy


__all__ = [
    "Accuracy",
    "ExpectedCalibrationError",
    "MacroF1",
    "MeanAveragePrecision",
    "MeanClassAccuracy",
    "TopKAccuracy",
    "compute_metrics",
    "compute_multi_label_metrics",
    "harmonic_mean",
    "softmax",
]
