"""Casting the frozen weights of a tower once for all chunks of its inputs, where autocast would for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..towers import execution_device, is_intercepted
from .chunks import autocast_state


Result = TypeVar("Result")


def keep_casts(encode: Callable[..., Result], parts: Sequence[nn.Module]) -> Callable[..., Result]:
    """Returns `encode`, which under autocast casts each frozen weight in its first call only.

    autocast itself keeps no casts of frozen weights. Where no gradients are computed, all weights are frozen. Casting
    again would give the same values, so results and gradients do not change. The casts live as long as the returned
    function, which a graph of autograd holds until it is freed.

    Args:
        encode (`Callable`):
            A function that calls the modules.
        parts (`Sequence[torch.nn.Module]`):
            The modules. If calls of one are intercepted, weights may be loaded for the call only (offloading,
            sharding), so that nothing of them is kept.
    """
    states = autocast_state(execution_device(parts[0])).values()
    if torch.compiler.is_compiling() or not any(is_enabled for is_enabled, _ in states):
        return encode
    if any(is_intercepted(module) for part in parts for module in part.modules()):
        return encode
    weights = [weight for part in parts for weight in part.parameters()]
    casts = _KeptCasts([weight for weight in weights if not (weight.requires_grad and torch.is_grad_enabled())])

    def encode_with_casts(*args):
        with casts:
            return encode(*args)

    return encode_with_casts


class _KeptCasts(TorchFunctionMode):
    """Gives linear layers what autocast makes of their weights. As autocast, it acts in the thread that enters it."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight): weight for weight in weights}
        self.casts: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            args = tuple(self._cast(value) if id(value) in self.weights else value for value in args)
        return func(*args, **(kwargs or {}))

    def _cast(self, weight: torch.Tensor) -> torch.Tensor:
        device_type = weight.device.type
        if weight.dtype != torch.float32 or not torch.is_autocast_enabled(device_type):
            return weight
        key = id(weight), torch.get_autocast_dtype(device_type)
        if key not in self.casts:
            self.casts[key] = weight.detach().to(key[1])
        return self.casts[key]
