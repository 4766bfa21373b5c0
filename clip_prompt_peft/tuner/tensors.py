"""New tensors of an adapter, which are not initialized."""

from __future__ import annotations

import torch
from torch import nn


def trainable_dtype(like: torch.Tensor) -> torch.dtype:
    """Returns the dtype of `like`, or float32 if it is lower: half precision is too coarse for optimizer steps."""
    return torch.promote_types(like.dtype, torch.float32)


def empty_vectors(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Returns vectors that are not initialized, on the device of `like`.

    They are not zeros, since memory that is never written to is never taken, should a file ask for too many vectors.
    """
    return torch.empty(shape, dtype=trainable_dtype(like), device=like.device)


def empty_linear(width_in: int, width_out: int, like: torch.Tensor) -> nn.Linear:
    """Returns a linear layer that is not initialized, on the device of `like`."""
    linear = nn.Linear(width_in, width_out, device="meta", dtype=trainable_dtype(like))
    # The parameters are assigned, since peft's low_cpu_mem_usage keeps assigned ones on the meta device.
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(torch.empty_like(parameter, device=like.device)))
    return linear
