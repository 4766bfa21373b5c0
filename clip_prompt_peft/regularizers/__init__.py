"""Regularizers, the loss terms on embeddings and logits. CONTRIBUTING.md describes how to add one."""

from __future__ import annotations

from .base import Prediction, Regularizer
from .kgcoop import KgCoOpRegularizer
from .prograd import ProGradRegularizer, project_gradient
from .promptsrc import PromptSRCRegularizer


# The keys are the values of `CLIPPromptTuningConfig.regularizer`. A test compares their weights with tuner/config.py.
REGULARIZERS: dict[str, type[Regularizer]] = {
    "kgcoop": KgCoOpRegularizer,
    "prograd": ProGradRegularizer,
    "promptsrc": PromptSRCRegularizer,
}


def build_regularizer(name: str, weights: dict[str, float] | None = None) -> Regularizer:
    """Creates a regularizer of `REGULARIZERS` by name. Weights default to the values of the authors' code."""
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
