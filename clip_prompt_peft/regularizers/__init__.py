"""Regularisers: loss terms on embeddings, one file each. See CONTRIBUTING.md for how to add one."""

from __future__ import annotations

import inspect

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

    Raises:
        ValueError: unknown name, unknown weight, or a weight that is no number of at least 0.
    """
    if name not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {sorted(REGULARIZERS)} or None, got {name!r}.")
    allowed = [key for key in inspect.signature(REGULARIZERS[name].__init__).parameters if key != "self"]
    for key, value in (weights or {}).items():
        if key not in allowed:
            raise ValueError(f"regularizer_weights of {name!r} may be {allowed}, got {key!r}.")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"regularizer_weights[{key!r}] must be a number of at least 0, got {value!r}.")
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
