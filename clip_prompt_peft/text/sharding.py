"""The classes of one model, spread over the processes that train it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def num_processes() -> int:
    """Processes in the default group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of_classes(num_classes: int, rank: int | None = None) -> range:
    """The classes that a process, by default this one, encodes; shares differ by one class at most."""
    size, rank = num_processes(), dist.get_rank() if rank is None else rank
    return range(num_classes * rank // size, num_classes * (rank + 1) // size)


def gather_shares(share: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(C, E) of all classes, from the (C / W, E) that each of the W processes holds. All of them must call it.

    Its gradient, averaged over the processes as DistributedDataParallel and its kin do, is exact: a share gets the
    gradients of all processes' losses, and averaging divides by W.
    """
    return _GatherShares.apply(share, num_classes)


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, num_classes):
        ctx.sizes = [len(share_of_classes(num_classes, rank)) for rank in range(num_processes())]
        longest = max(ctx.sizes)
        padded = share.new_zeros(longest, share.shape[1])  # collectives want equal sizes
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # (C, E)
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()], None
