"""Benchmark protocols of few-shot CLIP papers: few-shot curves, base-to-new generalization and transfer."""

from .benchmark import Benchmark
from .methods import METHODS, Backbone, FittedMethod, Method, TrainingSettings, find_method
from .results import (
    Predictions,
    Results,
    base_new_scores,
    base_new_table,
    few_shot_scores,
    few_shot_table,
    mean_scores,
    methods_table,
    transfer_table,
)
from .runs import Run, base_to_new, few_shot_curve, merge_runs, transfer


__all__ = [
    "METHODS",
    "Backbone",
    "Benchmark",
    "FittedMethod",
    "Method",
    "Predictions",
    "Results",
    "Run",
    "TrainingSettings",
    "base_new_scores",
    "base_new_table",
    "base_to_new",
    "few_shot_curve",
    "few_shot_scores",
    "few_shot_table",
    "find_method",
    "mean_scores",
    "merge_runs",
    "methods_table",
    "transfer",
    "transfer_table",
]
