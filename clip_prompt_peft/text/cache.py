"""Remembering results for as long as nothing changes that they depend on."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..towers import ADAPTER_LAYERS, WRAPPED, adapter_settings, hooks_of, inner_tensors


# Tensors up to this size, and all of an adapter, are compared by value; of larger, frozen ones only samples are.
SMALL = 2**16
NUM_SAMPLES = 64
NEAR = ("cpu",)  # where the host reads values without waiting for the device
MAX_COMPARED = 2**24  # values that are held for comparison, of all results together


class Memo:
    """
    Remembers the latest result of a computation, with the key that it was computed for.

    It can be shared by threads: the entries are replaced as a whole, so at worst a result is computed twice.
    """

    def __init__(self) -> None:
        self._entries: tuple[tuple[Any, Any], ...] = ()  # the latest used first

    def __reduce__(self):
        return type(self), ()  # copies and pickles start empty

    @property
    def latest(self) -> tuple[Any, Any] | None:
        """The key and the result that were used last."""
        return self._entries[0] if self._entries else None

    def clear(self) -> None:
        self._entries = ()

    def get(self, key: tuple, compute: Callable[[], Any]):
        """Returns the result for an equal key if it is remembered, and otherwise what `compute()` returns."""
        entries = self._entries
        found = next((entry for entry in entries if _are_equal(entry[0], key)), None)
        result = _in_ordinary_modes(compute) if found is None else found[1]
        # The new key takes the place of the equal one, so that the objects in use can be found by identity.
        self._entries = self._kept(((key, result), *(entry for entry in entries if entry is not found)))
        return result

    def _kept(self, entries: tuple) -> tuple:
        return entries[:1]


class ClassEmbedsMemo(Memo):
    """Remembers the class embeddings of several states, since adapters are switched, as far as memory allows."""

    def _kept(self, entries: tuple) -> tuple:
        entries = tuple((key, embeds) for key, embeds in entries if key[0].is_comparable)
        sizes = itertools.accumulate(key[0].num_values + embeds.numel() for key, embeds in entries)
        return entries[: max(1, sum(size <= MAX_COMPARED for size in sizes))]


class WeightsState:
    """
    Everything besides the inputs that the outputs of some modules depend on. If two states are equal, so are the
    outputs.

    `Tensor._version` alone is not enough: writes to `.data` (peft merges that way), `.to()` and fused optimizers leave
    it unchanged. Adapters are small, so they are compared by value. Frozen weights are compared by identity, address,
    version and a sample of their values. Writing to single values of a large frozen weight through `.data` is not
    noticed.

    Without adapters, the state is needed in every training step. On a device, where comparing values would make the
    host wait, identity, address, version and what is merged are compared, so that other writes through `.data` are
    not noticed.

    Args:
        parts (`Sequence[torch.nn.Module]`):
            The modules.
        with_adapters (`bool`, *optional*, defaults to `True`):
            Whether adapters, and whatever else is trained, belong to the state.
    """

    def __init__(self, parts: tuple[nn.Module, ...], with_adapters: bool = True) -> None:
        modules, tensors, is_small = [], [], []
        for module, in_adapter in (pair for part in parts for pair in _walk(part)):
            if in_adapter and not with_adapters:
                continue
            modules.append(module)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None or (tensor.requires_grad and not with_adapters):
                    continue
                for inner in inner_tensors(tensor):
                    tensors.append(inner)
                    is_small.append(in_adapter or tensor.requires_grad or inner.numel() <= SMALL)
        self.objects = [weakref.ref(thing) for thing in (*modules, *tensors)]
        self.versions = [_version(tensor) for tensor in tensors]
        is_waiting = not with_adapters and any(tensor.device.type not in NEAR for tensor in tensors)
        self.settings = adapter_settings(modules) if with_adapters else []
        if is_waiting:  # merging writes to the `.data` of frozen weights
            self.settings = [{"merged": repr(names)} for names in _merged(parts)]
        self.hooks = [hook for module in modules for hook in hooks_of(module)]
        num_small = sum(tensor.numel() for tensor, small in zip(tensors, is_small) if small)
        # Results with dropout are never the same, values that accelerate has offloaded cannot be compared, and hooks
        # wait for every call. Without adapters nothing of it matters: results are computed in eval mode, and frozen
        # weights rarely change.
        is_called_anew = any(module.training for module in modules) or bool(self.hooks)
        is_fixed = not is_called_anew and not any(tensor.is_meta for tensor in tensors)
        is_here = None not in self.versions  # and not a batch of torch.func.vmap
        self.is_comparable = num_small <= MAX_COMPARED and is_here and (is_fixed or not with_adapters)
        self.values = _values(tensors, is_small) if self.is_comparable and not is_waiting else []

    @property
    def num_values(self) -> int:
        return sum(tensor.numel() for tensor in self.values)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WeightsState)
            and self.is_comparable
            and other.is_comparable
            and self.settings == other.settings
            and self.hooks == other.hooks
            and len(self.objects) == len(other.objects)
            and all(a() is b() is not None for a, b in zip(self.objects, other.objects))
            and self.versions == other.versions
            and len(self.values) == len(other.values)
            and all(torch.equal(a, b) for a, b in zip(self.values, other.values))
        )


def _in_ordinary_modes(compute: Callable[[], Any]) -> Any:
    """Returns what `compute()` returns if the caller is in no mode that later callers may not be in.

    Inference tensors could not be used in a later training, and a default device is not that of the inputs of a model.
    Autocast stays as it is, and belongs into the key where it matters.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return compute()


def _are_equal(key: tuple, other: tuple) -> bool:
    # As `key == other`, but torch.compile can follow it, too: it does not call `__eq__` for the same object.
    return len(key) == len(other) and all(one is another or one == another for one, another in zip(key, other))


def _walk(module: nn.Module, in_adapter: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """Yields a module and all below it, each with whether it belongs to an adapter and is not wrapped by one."""
    in_adapter = in_adapter or isinstance(module, ADAPTER_LAYERS)
    yield module, in_adapter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, in_adapter and name not in WRAPPED)


def _merged(parts: tuple[nn.Module, ...]) -> list[list[str]]:
    """Returns the merged adapters of each adapter layer."""
    layers = (module for part in parts for module in part.modules() if isinstance(module, ADAPTER_LAYERS))
    return [list(getattr(layer, "merged_adapters", ())) for layer in layers]


def _version(tensor: torch.Tensor) -> tuple | None:
    """Returns address, type and version of a tensor, or `None` for one of torch.func.vmap, which has no address."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return None
    # Inference tensors count no versions; outside of inference mode they cannot be changed.
    return address, tensor.dtype, None if tensor.is_inference() else tensor._version


def _values(tensors: list[torch.Tensor], is_small: list[bool]) -> list[torch.Tensor]:
    """Returns the values that are compared, as one tensor for each device and dtype, which is fast to compare."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor, small in zip(tensors, is_small):
        if tensor.is_meta:
            continue
        flat = tensor.detach().flatten()
        sample = flat if small else flat[:: flat.numel() // NUM_SAMPLES]
        groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(samples) for samples in groups.values()]
