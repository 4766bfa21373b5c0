"""Encoding many classes in chunks, so that memory does not grow with their number, and sharing them over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


Chunk = TypeVar("Chunk")


def encode_in_chunks(
    encode: Callable[[Chunk], torch.Tensor], chunks: Sequence[Chunk], parameters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Concatenates the results of `encode` for all chunks, differentiably with respect to `parameters`.

    Only the graph of the last chunk is kept. The others are computed again for their gradient, with the same autocast
    and random state. Values and gradients are those of a single pass.

    Args:
        encode (`Callable`):
            Returns (K, E) for a chunk.
        chunks (`Sequence`):
            At least one chunk.
        parameters (`Sequence[torch.Tensor]`):
            The tensors that require gradients. Everything else that `encode` uses is treated as constant.

    Returns:
        `torch.Tensor`: (C, E).
    """
    if not parameters or not torch.is_grad_enabled():
        return torch.cat([encode(chunk) for chunk in chunks])
    return _Recomputed.apply(encode, chunks, *parameters)


def encode_by_images(
    encode: Callable[[Chunk, torch.Tensor], torch.Tensor], pairs: Sequence[tuple[Chunk, Sequence[torch.Tensor]]]
) -> torch.Tensor:
    """Concatenates the results of `encode` for every chunk with the vectors of a few images at a time.

    If there is more than one result, all are computed again for their gradient. The vectors depend on the images by
    way of parameters, so autograd has to find its way through them, and `checkpoint` is used.

    Args:
        encode (`Callable`):
            Returns (B', K, E) for a chunk and the vectors (B', n, D) of B' images.
        pairs (`Sequence`):
            Every chunk, with the vectors of all images in parts.

    Returns:
        `torch.Tensor`: (B, C, E).
    """
    if len(pairs) == 1 and len(pairs[0][1]) == 1:
        (chunk, (vectors,)) = pairs[0]
        return encode(chunk, vectors)
    of_chunks = [
        torch.cat([checkpoint(encode, chunk, part, use_reentrant=False) for part in parts]) for chunk, parts in pairs
    ]
    return torch.cat(of_chunks, dim=1)


class _Recomputed(torch.autograd.Function):
    """
    Takes the parameters as inputs and returns their gradients, so that autograd treats it as any other operation. A
    `backward()` inside would bypass the reducer of DistributedDataParallel.

    Non-reentrant `torch.utils.checkpoint` is as exact, but keeps more (small tower, one thread): 2.03 s and 147 MiB
    instead of 1.91 s and 115 MiB for 1,000 classes, 21.6 s and 506 MiB instead of 20.2 s and 158 MiB for 10,000.
    """

    @staticmethod
    def forward(ctx, encode, chunks, *parameters):
        ctx.encode, ctx.chunks = encode, chunks
        ctx.save_for_backward(*parameters)  # raises if one is changed in place before the backward pass
        ctx.states, outputs = [], []
        for chunk in chunks:
            ctx.states.append(_ComputeState(parameters[0]))
            if chunk is chunks[-1]:
                with torch.enable_grad():
                    ctx.last = encode(chunk)
                outputs.append(ctx.last.detach())
            else:
                with ctx.states[-1].autocast(cache_enabled=False):  # cached casts of weights would lack a gradient
                    outputs.append(encode(chunk))
        ctx.sizes = [len(output) for output in outputs]
        return torch.cat(outputs)  # (C, E)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        parameters = ctx.saved_tensors
        totals = [None] * len(parameters)
        # The last chunk comes first, so that its graph is freed before another one is computed.
        for index, part in reversed(list(enumerate(gradient.split(ctx.sizes)))):
            output = _Recomputed.with_graph(ctx, index)
            if output.requires_grad:
                gradients = torch.autograd.grad(output, parameters, part, allow_unused=True)
                totals = [_sum(total, new) for total, new in zip(totals, gradients)]
            del output
        return None, None, *totals

    @staticmethod
    def with_graph(ctx, index: int) -> torch.Tensor:
        """Returns the result (K, E) of a chunk with its graph."""
        if index == len(ctx.chunks) - 1 and ctx.last is not None:
            last, ctx.last = ctx.last, None  # a second backward pass computes it again
            return last
        with torch.enable_grad(), ctx.states[index].random_state(), ctx.states[index].autocast():
            return ctx.encode(ctx.chunks[index])


def _sum(total: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total + new  # not in place: autograd can return one tensor as the gradient of several


class _ComputeState:
    """The states of the random number generators and of autocast, at the time when the object is made."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device_type = tensor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)
        self.autocasts = autocast_state(tensor.device)

    @contextlib.contextmanager
    def autocast(self, cache_enabled: bool = True):
        with contextlib.ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocasts.items():
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled))
            yield

    @contextlib.contextmanager
    def random_state(self):
        with torch.random.fork_rng(self.devices, device_type=self.device_type if self.devices else "cuda"):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield


def autocast_state(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    """Returns, for the type of the device and for the CPU, whether autocast is on and its dtype."""
    return {
        device_type: (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
        for device_type in {device.type, "cpu"}
        if torch.amp.is_autocast_available(device_type)
    }


def num_processes() -> int:
    """Returns the number of processes in the default group, or 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of_classes(num_classes: int, rank: int | None = None) -> range:
    """Returns the classes that a process, by default this one, encodes. Shares differ by at most one class."""
    size, rank = num_processes(), dist.get_rank() if rank is None else rank
    return range(num_classes * rank // size, num_classes * (rank + 1) // size)


def gather_shares(share: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Gathers (C, E) from the shares (C / W, E) of W processes. All of them have to call it.

    Its gradient is exact if gradients are averaged over the processes, as DistributedDataParallel does: a share gets
    the sum of the gradients of all losses, and averaging divides it by W.
    """
    return _GatherShares.apply(share, num_classes)


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, num_classes):
        ctx.sizes = [len(share_of_classes(num_classes, rank)) for rank in range(num_processes())]
        longest = max(ctx.sizes)
        padded = share.new_zeros(longest, share.shape[1])  # collectives need equal sizes
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
