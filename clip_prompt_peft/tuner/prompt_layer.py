"""What the layers of the tuner have in common."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..adapter_files import check_values
from .config import CLIPPromptTuningConfig


RANDOM_STD = 0.02  # of all freshly drawn vectors, in CoOp, MaPLe, IVLP and PromptSRC alike


class CLIPPromptLayer(nn.Module, BaseTunerLayer):
    """
    A module of CLIP together with the learnable tensors that act on its input or output.

    Tensors are held in containers named `learnable_*`, keyed by adapter. Which adapter is active, disabled or merged
    is state of the layer: a `PeftModel` calls the base model directly, and transformers' own `add_adapter` keeps no
    tuner object at all.
    """

    other_param_names = ("prompt_configs", "_placeholders")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_configs: dict[str, CLIPPromptTuningConfig] = {}
        # by adapter and parameter name: what is to be overwritten by saved weights and has not been yet
        self._placeholders: dict[str, dict[str, nn.Parameter]] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.prompt_configs]

    @contextmanager
    def _starting(self, adapter_name: str, config: CLIPPromptTuningConfig):
        """Enters an adapter, an older one of that name forgotten; its tensors are made in the body."""
        self.prompt_configs[adapter_name] = config
        self._placeholders.pop(adapter_name, None)
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container:
                del container[adapter_name]
        yield
        if config._loaded:
            self._placeholders[adapter_name] = dict(self.parameters_of(adapter_name))

    def parameters_of(self, adapter_name: str):
        """Names, relative to this layer, and tensors of an adapter."""
        for container_name in self.adapter_layer_names:
            for name, parameter in getattr(self, container_name).named_parameters(prefix=container_name):
                if name.split(".")[1] == adapter_name:
                    yield name, parameter

    def _check_weights(self, adapter_name: str) -> None:
        """Raises `ValueError` if weights were to be loaded and were not, of which transformers' `load_adapter` only
        warns, or if they hold NaN."""
        placeholders = self._placeholders.get(adapter_name)
        if not placeholders:
            return
        tensors = dict(self.parameters_of(adapter_name))
        if any(placeholders.get(key) is value for key, value in tensors.items()):
            raise ValueError(
                f"The configuration of adapter {adapter_name!r} belongs to saved weights, but none were loaded: the "
                "file is damaged, belongs to another model, or has the text tower at another path (then "
                "PeftModel.from_pretrained finds it). To start a new adapter, make a CLIPPromptTuningConfig without "
                "replaced_token_ids."
            )
        if not torch.compiler.is_compiling():  # which cannot look at values
            check_values(tensors)
            del self._placeholders[adapter_name]  # all is well for good

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for placeholders in self._placeholders.values():
            for key in [key for key in placeholders if f"{prefix}{key}" in state_dict]:
                del placeholders[key]

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of `adapter_names` that act here; raises `ValueError` if one of them cannot be merged at all."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.prompt_configs]
        for name in names:
            obstacle = self.prompt_configs[name].merge_obstacle
            if obstacle is not None:
                raise ValueError(
                    f"Adapter {name!r} cannot be merged: {obstacle}. Only vectors that are the same for every class "
                    "and image, at fixed positions of the text, can be folded into CLIP's position embeddings. Keep "
                    "the adapter, or export the image tower together with the class embeddings."
                )
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Only [`CLIPTextLearnableEmbeddings`] has something to fold in; other layers refuse what they hold."""
        self._adapters_to_merge(adapter_names)

    def unmerge(self) -> None:
        """Nothing is ever merged here."""

    def __repr__(self) -> str:
        return "clip_prompt_tuning." + super().__repr__()


def random_vectors(shape: tuple[int, ...], like: torch.Tensor, draw: bool = True) -> torch.Tensor:
    """normal(0, 0.02), in float32 at least: half precision is too coarse for the steps of an optimizer.

    Args:
        shape: of the result.
        like: for device and dtype.
        draw: `False` if values are about to be loaded; nothing is drawn from the random number generator then.
    """
    # Not zeros: what is never written to takes no memory, should a file ask for more vectors than it has.
    vectors = torch.empty(shape, dtype=trainable_dtype(like), device=like.device)
    return vectors.normal_(std=RANDOM_STD) if draw else vectors


def trainable_dtype(like: torch.Tensor) -> torch.dtype:
    """The dtype of `like`, but float32 at least."""
    return torch.promote_types(like.dtype, torch.float32)
