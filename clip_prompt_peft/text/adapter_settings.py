"""What the adapter layers in a tower are set to."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def adapter_settings(modules: Iterable[nn.Module]) -> list:
    """Of each adapter layer among the modules, which adapter is active, disabled or merged, scaling factors, ...:
    whatever plain values the layer holds."""
    adapters = [module for module in modules if isinstance(module, ADAPTERS)]
    return [{name: repr(value) for name, value in vars(adapter).items() if _is_plain(value)} for adapter in adapters]


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
