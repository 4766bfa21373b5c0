"""What a computation depends on beside its inputs, kept so that it can be run again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


class Surroundings:
    """The state of random number generators and of autocast, where it was made.

    Args:
        tensor: on the device of the computation.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device_type = tensor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)
        self.autocasts = autocast_state(tensor.device)

    @contextlib.contextmanager
    def autocast(self, cache_enabled: bool = True):
        """Autocast as it was. Without the cache, casts of weights are not kept for later use."""
        with contextlib.ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocasts.items():
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled))
            yield

    @contextlib.contextmanager
    def random_state(self):
        """The generators as they were; on leaving, as they are now."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type if self.devices else "cuda"):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield


def autocast_state(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    """For the device and the CPU: whether autocast is on, and to which dtype."""
    return {
        device_type: (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
        for device_type in {device.type, "cpu"}
        if torch.amp.is_autocast_available(device_type)
    }


Chunk = TypeVar("Chunk")


def encode_in_chunks(
    encode: Callable[[Chunk], torch.Tensor], chunks: Sequence[Chunk], parameters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The results of `encode` for all chunks, one below the other, differentiable with respect to `parameters`.

    Only the last chunk's computation is kept: each other is computed again when its gradient is wanted, in the same
    autocast and random state. Values and gradients are those of a single pass.

    Args:
        encode: gives (K, E) for a chunk.
        chunks: at least one.
        parameters: the tensors to differentiate by, all of which require gradients; everything else that `encode` uses
            is taken as constant.
    """
    if not parameters or not torch.is_grad_enabled():
        return torch.cat([encode(chunk) for chunk in chunks])
    return _Recomputed.apply(encode, chunks, *parameters)


def encode_by_images(
    encode: Callable[[Chunk, torch.Tensor], torch.Tensor], pairs: Sequence[tuple[Chunk, Sequence[torch.Tensor]]]
) -> torch.Tensor:
    """The results of `encode` for every chunk with the vectors of a few images at a time, computed again for the
    gradient if there is more than one to compute.

    The vectors come out of the images by way of parameters, so that, unlike above, autograd has to find its own way:
    what is kept are the results, which are wanted anyway.

    Args:
        encode: gives (B', K, E) for a chunk and the vectors (B', n, D) of B' images.
        pairs: every chunk, with the vectors of all images in parts.

    Returns:
        (B, C, E)
    """
    if len(pairs) == 1 and len(pairs[0][1]) == 1:
        (chunk, (vectors,)) = pairs[0]
        return encode(chunk, vectors)
    of_chunks = [
        torch.cat([checkpoint(encode, chunk, part, use_reentrant=False) for part in parts]) for chunk, parts in pairs
    ]
    return torch.cat(of_chunks, dim=1)


class _Recomputed(torch.autograd.Function):
    """Takes the parameters as inputs and returns their gradients, so that autograd delivers them as those of any other
    operation. A `backward()` inside would go past DistributedDataParallel's reducer."""

    @staticmethod
    def forward(ctx, encode, chunks, *parameters):
        ctx.encode, ctx.chunks = encode, chunks
        ctx.save_for_backward(*parameters)  # complains if one is changed in place before the backward pass
        ctx.surroundings, outputs = [], []
        for chunk in chunks:
            ctx.surroundings.append(Surroundings(parameters[0]))
            if chunk is chunks[-1]:
                with torch.enable_grad():
                    ctx.last = encode(chunk)
                outputs.append(ctx.last.detach())
            else:
                with ctx.surroundings[-1].autocast(cache_enabled=False):  # casts made here would lack a gradient
                    outputs.append(encode(chunk))
        ctx.sizes = [len(output) for output in outputs]
        return torch.cat(outputs)  # (C, E)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        parameters = ctx.saved_tensors
        totals = [None] * len(parameters)
        # from the last on, so that what is kept of it is gone before another one is computed
        for index, part in reversed(list(enumerate(gradient.split(ctx.sizes)))):
            output = _Recomputed.with_graph(ctx, index)
            if output.requires_grad:
                gradients = torch.autograd.grad(output, parameters, part, allow_unused=True)
                totals = [_sum(total, new) for total, new in zip(totals, gradients)]
            del output
        return None, None, *totals

    @staticmethod
    def with_graph(ctx, index: int) -> torch.Tensor:
        """(K, E) of a chunk, to be differentiated."""
        if index == len(ctx.chunks) - 1 and ctx.last is not None:
            last, ctx.last = ctx.last, None  # a second backward pass computes it again
            return last
        surroundings = ctx.surroundings[index]
        with torch.enable_grad(), surroundings.random_state(), surroundings.autocast():
            return ctx.encode(ctx.chunks[index])


def _sum(total: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total + new  # not in place: autograd may hand out one tensor as the gradient of several


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
