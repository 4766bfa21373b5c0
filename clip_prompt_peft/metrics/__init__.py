"""Metrics of image classification, as `evaluate.Metric`s that need no network.

A metric is one file with one class; `evaluate.load` takes the file's path as well.
"""

from .accuracy import Accuracy
from .compute import compute_metrics
from .mean_class_accuracy import MeanClassAccuracy


__all__ = ["Accuracy", "MeanClassAccuracy", "compute_metrics"]
