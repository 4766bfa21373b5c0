"""Class embeddings that are kept for as long as nothing that they depend on changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import CLIPModel

from ..class_prompts import ClassPrompts
from .paths import run_state
from .surroundings import autocast_state


# Tensors up to this size, and all of an adapter, are compared by value; of larger ones, frozen, only samples.
SMALL = 2**16
NUM_SAMPLES = 64
MAX_COMPARED = 2**24  # adapters with more values than this are not worth a second copy: nothing is kept


class ClassEmbedsCache:
    """Holds one result, and the state of everything that it was made from."""

    def __init__(self) -> None:
        self._kept: tuple[_State, torch.Tensor] | None = None

    def clear(self) -> None:
        self._kept = None

    def get(self, model: CLIPModel, prompts: ClassPrompts, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `encode()` gives, or gave when everything was as it is now.

        Args:
            model: whose text side makes the embeddings.
            prompts: of the classes.
            encode: gives (C, E) without a gradient.
        """
        state = _State(model, prompts) if _is_deterministic(model) else None
        kept = self._kept  # read once: another thread may exchange it
        if state is not None and kept is not None and kept[0] == state:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # for later use in training, unlike inference tensors
            embeds = encode()
        self._kept = None if state is None or state.is_too_large else (state, embeds)
        return embeds


def text_side(model: CLIPModel) -> tuple[nn.Module, ...]:
    """The modules that class embeddings are made by."""
    return model.text_model, model.text_projection


def _is_deterministic(model: CLIPModel) -> bool:
    return not any(module.training for part in text_side(model) for module in part.modules())


class _State:
    """Everything that class embeddings depend on; equal to another if both give the same embeddings.

    `Tensor._version` alone does not tell: it stands still under writes to `.data` (peft merges that way), under
    `.to()`, and under fused optimizers. An adapter is small, so it is compared by value. Frozen weights are compared
    by identity, place in memory, version, and a sample of their values. What is not seen is somebody writing to single
    values of a large frozen weight through `.data`.
    """

    def __init__(self, model: CLIPModel, prompts: ClassPrompts) -> None:
        modules = [module for part in text_side(model) for module in part.modules()]
        tensors = [tensor for part in text_side(model) for tensor in (*part.parameters(), *part.buffers())]
        adapters = [module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        of_adapters = {id(tensor) for adapter in adapters for tensor in _own_tensors(adapter)}
        whole = [t for t in tensors if id(t) in of_adapters or t.requires_grad or t.numel() <= SMALL]

        self.prompts = prompts
        self.objects = [weakref.ref(thing) for thing in (*modules, *tensors)]
        self.versions = [_version(tensor) for tensor in tensors]
        self.settings = [_plain_attributes(adapter) for adapter in adapters]
        self.settings.append((run_state(model.text_model), autocast_state(model.text_model.device)))
        self.is_too_large = sum(tensor.numel() for tensor in whole) > MAX_COMPARED
        self.values = [] if self.is_too_large else _values(tensors, {id(tensor) for tensor in whole})

    def __eq__(self, other: _State) -> bool:
        return (
            self.prompts is other.prompts
            and not self.is_too_large
            and len(self.objects) == len(other.objects)
            and all(a() is b() is not None for a, b in zip(self.objects, other.objects))
            and self.versions == other.versions
            and self.settings == other.settings
            and len(self.values) == len(other.values)
            and all(torch.equal(a, b) for a, b in zip(self.values, other.values))
        )


def _own_tensors(adapter: nn.Module) -> list[torch.Tensor]:
    """Without those of the module that it wraps."""
    wrapped = ("base_layer.", "original_module.")
    return [tensor for name, tensor in adapter.named_parameters() if not name.startswith(wrapped)]


def _version(tensor: torch.Tensor) -> tuple:
    # inference tensors count no versions and cannot be changed outside of inference mode
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _plain_attributes(adapter: nn.Module) -> dict[str, str]:
    """Which adapter is active, disabled or merged, scaling factors, ...: whatever plain values the layer holds."""
    return {name: repr(value) for name, value in vars(adapter).items() if _is_plain(value)}


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _values(tensors: list[torch.Tensor], whole: set[int]) -> list[torch.Tensor]:
    """The values that are compared: one tensor for each device and dtype, so that comparing takes few steps."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().flatten()
        sample = flat if id(tensor) in whole else flat[:: flat.numel() // NUM_SAMPLES]
        groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(samples) for samples in groups.values()]
