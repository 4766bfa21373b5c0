"""Regularizers: loss terms on embeddings, one file for each paper. CONTRIBUTING.md describes how to add one."""

from __future__ import annotations

from .base import Prediction, Regularizer
from .kgcoop import KgCoOpRegularizer
from .prograd import ProGradRegularizer, project_gradient
from .promptsrc import PromptSRCRegularizer


# The values of `CLIPPromptTuningConfig.regularizer`; tuner/config.py lists their weights, which a test compares.
REGULARIZERS: dict[str, type[Regularizer]] = {
    "kgcoop": KgCoOpRegularizer,
    "prograd": ProGradRegularizer,
    "promptsrc": PromptSRCRegularizer,
}


def build_regularizer(name: str, weights: dict[str, float] | None = None) -> Regularizer:
    """Creates the regularizer `name` of `REGULARIZERS`. Weights that are left out have the values of the paper."""
    return REGULARIZERS[name](**(weights or {}))


__all__ = [
    "REGULARIZERS",
    "KgCoOpRegularizer",
    "Prediction",
    "ProGradRegularizer",
    "PromptSRCRegularizer",
    "Regularizer",
    "build_regularizer",
    "project_gradient",
]
