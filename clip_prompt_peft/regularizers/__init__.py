"""Regularizers, the loss terms on embeddings and logits. CONTRIBUTING.md describes how to add one."""

from __future__ import annotations

from ..tuner.layout import PromptLayout
from .base import Prediction, Regularizer
from .kgcoop import KgCoOpRegularizer
from .prograd import ProGradRegularizer, project_gradient
from .promptsrc import PromptSRCRegularizer


# The keys are the values of `CLIPPromptTuningConfig.regularizer`. A test compares their weights with
# tuner/config_checks.py.
REGULARIZERS: dict[str, type[Regularizer]] = {
    "kgcoop": KgCoOpRegularizer,
    "prograd": ProGradRegularizer,
    "promptsrc": PromptSRCRegularizer,
}


def build_regularizer(name: str, weights: dict[str, float] | None = None) -> Regularizer:
    """Creates a regularizer of `REGULARIZERS` by name. Weights default to the values of the authors' code."""
    return REGULARIZERS[name](**(weights or {}))


def regularizer_of(layout: PromptLayout) -> Regularizer:
    """Creates the regularizer of a prompt adapter that has one."""
    regularizer = build_regularizer(layout.regularizer, layout.regularizer_weights)
    if layout.teacher_templates:
        regularizer.teacher_templates = tuple(layout.teacher_templates)
    return regularizer


__all__ = [
    "REGULARIZERS",
    "KgCoOpRegularizer",
    "Prediction",
    "ProGradRegularizer",
    "PromptSRCRegularizer",
    "Regularizer",
    "build_regularizer",
    "project_gradient",
    "regularizer_of",
]
