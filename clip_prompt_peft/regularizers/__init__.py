"""Regularisers: loss terms on embeddings, one file each. See CONTRIBUTING.md for how to add one."""

from __future__ import annotations

from .base import Prediction, Regularizer
from .kgcoop import KgCoOpRegularizer
from .prograd import ProGradRegularizer, project_gradient
from .promptsrc import PromptSRCRegularizer


# What `CLIPPromptTuningConfig(regularizer=...)` may name.
REGULARIZERS: dict[str, type[Regularizer]] = {
    "kgcoop": KgCoOpRegularizer,
    "prograd": ProGradRegularizer,
    "promptsrc": PromptSRCRegularizer,
}


def build_regularizer(name: str, weights: dict[str, float] | None = None) -> Regularizer:
    """
    Args:
        name: one of `REGULARIZERS`.
        weights: keyword arguments for it.

    """
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
