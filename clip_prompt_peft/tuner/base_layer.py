"""The base class of the layers that hold learnable vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..templates import name_labels
from .files import check_values
from .layout import PromptLayout


# A context variable, so that other threads that use the same model keep their prompts.
_WITHOUT_PROMPTS: ContextVar[bool] = ContextVar("without_prompts", default=False)


@contextmanager
def without_prompts() -> Iterator[None]:
    """Lets all prompts be left out for a while, in this thread. Which tensors are trained stays the same."""
    token = _WITHOUT_PROMPTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_PROMPTS.reset(token)


class LabelingLayer(BaseTunerLayer):
    """
    Keeps the labels in the config of a classifier those of the classes in use, however adapters are switched.

    Every way to switch adapters, of peft and of transformers, and to delete one, calls `set_adapter` or
    `enable_adapters`. List it before a layer of a method.
    """

    _labeled_config = None  # of the classifier

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._name_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._name_labels()

    def label_with(self, config) -> None:
        """Keeps `id2label` and `label2id` in the config of a classifier those of its classes in use, from now on."""
        self._labeled_config = config
        self._name_labels()

    def _name_labels(self) -> None:
        config = self._labeled_config
        if config is not None:
            name_labels(config, self._names_in_effect() or config.class_names)

    def _names_in_effect(self) -> list[str] | None:
        """Returns the classes of the adapter in effect, if there is one with classes of its own."""
        raise NotImplementedError


class CLIPPromptLayer(nn.Module, BaseTunerLayer):
    """
    The base class of all layers of the method: a module of CLIP and the learnable tensors that act on it.

    The tensors are held in containers named `learnable_*`, with the names of adapters as keys. The layer itself knows
    which adapters are active, disabled or merged: a `PeftModel` calls the base model directly, and transformers' own
    `add_adapter` keeps no tuner object at all.

    **Attributes**:
        - **prompt_layouts** (`dict[str, PromptLayout]`): The layout of each adapter.
    """

    other_param_names = ("prompt_layouts", "_awaited")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_layouts: dict[str, PromptLayout] = {}
        # By adapter and tensor name, the tensors that saved weights have to replace before the adapter is used.
        self._awaited: dict[str, dict[str, torch.Tensor]] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer leaves its module alone: as in peft, and inside of [`without_prompts`]."""
        # A context variable would break the graph of torch.compile, which takes the property of a base class for true.
        return self._disable_adapters or (not torch.compiler.is_compiling() and _WITHOUT_PROMPTS.get())

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.prompt_layouts]

    def _begin(self, adapter_name: str, layout: PromptLayout) -> None:
        """Sets the layout of an adapter, and removes the tensors of an older adapter of the same name."""
        self.prompt_layouts[adapter_name] = layout
        self._awaited.pop(adapter_name, None)
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container:
                del container[adapter_name]

    def parameters_of(self, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of an adapter that are saved, with their names relative to this layer."""
        for container_name in self.adapter_layer_names:
            container = getattr(self, container_name)
            for name, tensor in container.state_dict(prefix=f"{container_name}.", keep_vars=True).items():
                if name.split(".")[1] == adapter_name:
                    yield name, tensor

    def await_weights(self, adapter_name: str) -> None:
        """Marks the tensors of an adapter as not initialized: it cannot be used before saved weights are loaded."""
        self._awaited[adapter_name] = dict(self.parameters_of(adapter_name))

    def _check_weights(self, adapter_name: str) -> None:
        """Raises `ValueError` if saved weights were not loaded, which transformers only warns about, or hold NaN."""
        awaited = self._awaited.get(adapter_name)
        if not awaited:
            return
        tensors = dict(self.parameters_of(adapter_name))
        if any(awaited.get(key) is value for key, value in tensors.items()):
            raise ValueError(
                f"The configuration of adapter {adapter_name!r} belongs to saved weights, but none were loaded: the "
                "file is damaged, belongs to another model, or has the text tower at another path (then "
                "PeftModel.from_pretrained finds it). To start a new adapter, make a CLIPPromptTuningConfig without "
                "replaced_token_ids."
            )
        if not torch.compiler.is_compiling():  # values are unknown while compiling
            with ExitStack() as stack:
                for part in (part for name in self.adapter_layer_names for part in getattr(self, name).modules()):
                    stack.enter_context(align_module_device(part))  # if accelerate has offloaded it
                check_values(dict(self.parameters_of(adapter_name)))
            self._awaited.pop(adapter_name, None)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for awaited in self._awaited.values():
            for key in [key for key in awaited if f"{prefix}{key}" in state_dict]:
                del awaited[key]

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Returns the adapters that act here; raises `ValueError` if one of them cannot be merged."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.prompt_layouts]
        for name in names:
            obstacle = self.prompt_layouts[name].merge_obstacle
            if obstacle is not None:
                raise ValueError(
                    f"Adapter {name!r} cannot be merged: {obstacle}. Only vectors that are the same for every class "
                    "and image, at fixed positions of the text, can be folded into CLIP's position embeddings. Keep "
                    "the adapter, or export the image tower together with the class embeddings."
                )
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses what cannot be merged. Only [`CLIPTextLearnableEmbeddings`] has something to merge."""
        self._adapters_to_merge(adapter_names)

    def unmerge(self) -> None:
        """Does nothing, since nothing is ever merged here."""

    def __repr__(self) -> str:
        return "clip_prompt_tuning." + super().__repr__()
