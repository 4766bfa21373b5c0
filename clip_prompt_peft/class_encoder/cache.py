"""Class embeddings that are kept for as long as nothing that they depend on changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import CLIPModel

from ..class_prompts import ClassPrompts
from ..dual_encoder import text_side
from .paths import attention_of
from .surroundings import autocast_state


# Tensors up to this size, and all of an adapter, are compared by value; of larger ones, frozen, only samples.
SMALL = 2**16
NUM_SAMPLES = 64
MAX_COMPARED = 2**24  # adapters with more values than this are not worth a second copy: nothing is kept
ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
WRAPPED = ("base_layer", "original_module")  # what adapters call the module that they wrap


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
        state = _State(model, prompts)
        kept = self._kept  # read once: another thread may exchange it
        if kept is not None and kept[0] == state:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # for later use in training, unlike inference tensors
            embeds = encode()
        self._kept = (state, embeds) if state.can_be_kept else None
        return embeds


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

    def __eq__(self, other: _State) -> bool:
        return (
            self.prompts is other.prompts
            and self.can_be_kept
            and other.can_be_kept
            and len(self.objects) == len(other.objects)
            and all(a() is b() is not None for a, b in zip(self.objects, other.objects))
            and self.versions == other.versions
            and self.settings == other.settings
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


def _values(tensors: list[torch.Tensor], whole: list[bool]) -> list[torch.Tensor]:
    """The values that are compared: one tensor for each device and dtype, so that comparing takes few steps."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor, is_whole in zip(tensors, whole):
        flat = tensor.detach().flatten()
        sample = flat if is_whole else flat[:: flat.numel() // NUM_SAMPLES]
        groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(samples) for samples in groups.values()]
