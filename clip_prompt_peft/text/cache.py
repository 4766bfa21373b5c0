"""Class embeddings that are kept for as long as nothing that they depend on changes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import CLIPModel

from ..towers import ADAPTERS, adapter_settings, text_side
from .chunks import autocast_state
from .packing import attention_of
from .prompts import ClassPrompts


# Tensors up to this size, and all of an adapter, are compared by value; of larger ones, frozen, only samples.
SMALL = 2**16
NUM_SAMPLES = 64
MAX_COMPARED = 2**24  # values held for comparison, of all results together; more are not worth their memory
WRAPPED = ("base_layer", "original_module")  # what adapters call the module that they wrap


class ClassEmbedsCache:
    """Holds results, each with the state of everything that it was made from: several, since adapters are switched."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[_State, torch.Tensor], ...] = ()  # the latest used first

    def clear(self) -> None:
        self._kept = ()

    def get(self, model: CLIPModel, prompts: ClassPrompts, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `encode()` gives, or gave when everything was as it is now.

        Args:
            model: whose text side makes the embeddings.
            prompts: of the classes.
            encode: gives (C, E) without a gradient.
        """
        state = _State(model, prompts)
        kept = self._kept  # read once: another thread may exchange it
        found = next((pair for pair in kept if pair[0] == state), None)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # for later use in training, unlike inference tensors
                found = state, encode()
        if state.can_be_kept:
            self._kept = _within_bounds((found, *(pair for pair in kept if pair is not found)))
        return found[1]


def _within_bounds(pairs: tuple[tuple[_State, torch.Tensor], ...]) -> tuple[tuple[_State, torch.Tensor], ...]:
    """As many from the first on as there is room for, one at least."""
    sizes = itertools.accumulate(state.num_values + embeds.numel() for state, embeds in pairs)
    return pairs[: max(1, sum(size <= MAX_COMPARED for size in sizes))]


def trained_parameters(model: CLIPModel) -> list[nn.Parameter]:
    """The parameters on the text side that require gradients."""
    return [parameter for part in text_side(model) for parameter in part.parameters() if parameter.requires_grad]


class _State:
    """Everything that class embeddings depend on; equal to another if both give the same embeddings.

    `Tensor._version` alone does not tell: it stands still under writes to `.data` (peft merges that way), under
    `.to()`, and under fused optimizers. An adapter is small, so it is compared by value. Frozen weights are compared
    by identity, place in memory, version, and a sample of their values. What is not seen is somebody writing to single
    values of a large frozen weight through `.data`.
    """

    def __init__(self, model: CLIPModel, prompts: ClassPrompts) -> None:
        walked = [pair for part in text_side(model) for pair in _walk(part)]
        modules = [module for module, _ in walked]
        tensors, of_adapters = [], []
        for module, is_of_adapter in walked:
            own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            tensors += own
            of_adapters += [is_of_adapter] * len(own)
        whole = [flag or t.requires_grad or t.numel() <= SMALL for t, flag in zip(tensors, of_adapters)]

        self.prompts = prompts
        self.objects = [weakref.ref(thing) for thing in (*modules, *tensors)]
        self.versions = [_version(tensor) for tensor in tensors]
        self.settings = adapter_settings(modules)
        self.settings.append((attention_of(model.text_model), autocast_state(model.text_model.device)))
        num_whole = sum(tensor.numel() for tensor, flag in zip(tensors, whole) if flag)
        self.can_be_kept = (
            num_whole <= MAX_COMPARED
            and not any(module.training for module in modules)  # dropout may make every result another one
            and not any(tensor.is_meta for tensor in tensors)  # offloaded by accelerate: out of sight
        )
        self.values = _values(tensors, whole) if self.can_be_kept else []

    @property
    def num_values(self) -> int:
        return sum(tensor.numel() for tensor in self.values)

    def __eq__(self, other: _State) -> bool:
        return (
            self.can_be_kept
            and other.can_be_kept
            and self.settings == other.settings
            and self.prompts == other.prompts
            and len(self.objects) == len(other.objects)
            and all(a() is b() is not None for a, b in zip(self.objects, other.objects))
            and self.versions == other.versions
            and len(self.values) == len(other.values)
            and all(torch.equal(a, b) for a, b in zip(self.values, other.values))
        )


def _walk(module: nn.Module, of_adapter: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """The module and all below it, each with whether it is an adapter's and not one that an adapter wraps."""
    of_adapter = of_adapter or isinstance(module, ADAPTERS)
    yield module, of_adapter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, of_adapter and name not in WRAPPED)


def _version(tensor: torch.Tensor) -> tuple:
    # inference tensors count no versions and cannot be changed outside of inference mode
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _values(tensors: list[torch.Tensor], whole: list[bool]) -> list[torch.Tensor]:
    """The values that are compared: one tensor for each device and dtype, so that comparing takes few steps."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor, is_whole in zip(tensors, whole):
        flat = tensor.detach().flatten()
        sample = flat if is_whole else flat[:: flat.numel() // NUM_SAMPLES]
        groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(samples) for samples in groups.values()]
