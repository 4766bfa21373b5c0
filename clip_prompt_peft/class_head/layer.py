"""The layers of the method: around the classifier's `class_head`, and around LayerNorms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..heads import ClassHead
from ..text import normalize
from ..tuner.base_layer import LabelingLayer
from .config import ClassHeadConfig
from .heads import CacheHead, LinearHead, new_head


MERGE_OBSTACLE = (
    "A class head cannot be merged: a plain dual encoder has no place for class weights. Keep the adapter, or export "
    "the image tower together with the class embeddings (export_classifier)."
)


class TunedLayerNorm(LNTuningLayer):
    """peft's layer around a LayerNorm, which leaves it alone while an adapter is active that does not tune it."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        tuned = [name for name in self.active_adapters if name in self.ln_tuning_layers]
        if self.disable_adapters or not tuned:
            return self.base_layer(x, *args, **kwargs)
        # Tuned values are in float32, also in a model in half precision.
        dtype = next(self.ln_tuning_layers[tuned[0]].parameters()).dtype
        return super().forward(x.to(dtype), *args, **kwargs).to(x.dtype)


class ClassHeadLayer(LabelingLayer, ClassHead, BaseTunerLayer):
    """
    The `class_head` of a classifier with the heads of adapters, of which the active one answers for its classes.

    Classes that the head does not know are encoded by the text tower.

    **Attributes**:
        - **ln_tuning_head** (`nn.ModuleDict`) -- The [`LinearHead`] or [`CacheHead`] of each adapter. peft finds the
          tensors of a method by the prefix of their containers, which is that of LayerNorms here.
        - **configs** (`dict[str, ClassHeadConfig]`) -- The configuration of each adapter.
        - **names_in_use** (`dict[str, list[str]]`) -- The classes in use while an adapter is active.
    """

    adapter_layer_names = ("ln_tuning_head",)
    other_param_names = ("configs", "names_in_use", "_awaited")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ln_tuning_head = nn.ModuleDict()
        self.configs: dict[str, ClassHeadConfig] = {}
        self.names_in_use: dict[str, list[str]] = {}
        self._awaited: dict[str, torch.Tensor] = {}  # what saved weights have to replace before the head is used
        self.merged_adapters = []
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: ClassHeadConfig, like: torch.Tensor) -> None:
        """Adds the head of an adapter, not initialized. An older one of that name is replaced."""
        self.ln_tuning_head[adapter_name] = new_head(config, like)
        self.configs[adapter_name] = config
        self.names_in_use[adapter_name] = list(config.class_names)
        self._awaited.pop(adapter_name, None)

    def await_weights(self, adapter_name: str) -> None:
        """Marks a head as not initialized: it cannot be used before saved weights are loaded."""
        head = self.head(adapter_name)
        self._awaited[adapter_name], head.is_fitted = head.class_embeds, True

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self.ln_tuning_head):
            if f"{prefix}ln_tuning_head.{name}.class_embeds" in state_dict:
                self._awaited.pop(name, None)

    def head(self, adapter_name: str) -> LinearHead | CacheHead:
        """Returns the head of an adapter."""
        return cast("LinearHead | CacheHead", self.ln_tuning_head[adapter_name])

    def active_name(self) -> str | None:
        """Returns the name of the adapter whose head answers; `None` if there is none.

        Raises:
            ValueError: If several are active, or the weights of the active one were not loaded.
        """
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.ln_tuning_head]
        if len(names) > 1:
            raise ValueError(f"The class heads {names} cannot be active together; activate one of them.")
        return names[0] if names else None

    def _active_head(self) -> tuple[LinearHead | CacheHead, ClassHeadConfig] | None:
        name = self.active_name()
        if name is None or self.configs[name].starts_later:
            return None
        if self._awaited.get(name) is self.head(name).class_embeds:
            raise ValueError(
                f"The configuration of adapter {name!r} belongs to saved weights, but none were loaded: the file is "
                "damaged, or belongs to another model. To start a new adapter, make a ClassHeadConfig without "
                "embed_width."
            )
        return self.head(name), self.configs[name]

    # What the classifier asks for

    @property
    def configs_in_effect(self) -> list[ClassHeadConfig]:
        """The configuration of the adapter whose head answers, as it is saved."""
        name = self.active_name()
        return [] if name is None else [self.configs[name]]

    @property
    def class_names(self) -> list[str] | None:
        name = self.active_name()
        return None if name is None else self.names_in_use[name]

    @property
    def adapter_config(self) -> ClassHeadConfig | None:
        name = self.active_name()
        return None if name is None else self.configs[name]

    def set_class_names(self, class_names: Sequence[str]) -> None:
        name = self.active_name()
        if name is not None:
            self.names_in_use[name] = list(class_names)

    def class_embeds(self, class_names: Sequence[str] | None, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        active = self._active_head()
        if active is None or class_names is None:
            return encode()
        head, config = active
        if list(class_names) == config.class_names:
            return normalize(head.class_embeds)
        places = places_of(class_names, config)
        known = [i for i, place in enumerate(places) if place is not None]
        if not known:
            return encode()
        device = head.class_embeds.device
        rows = normalize(head.class_embeds)[torch.tensor([places[i] for i in known], device=device)]
        if len(known) == len(places):
            return rows
        embeds = encode()  # (C, E)
        return embeds.to(rows).index_copy(0, torch.tensor(known, device=device), rows)

    def forward(
        self, image_embeds: torch.Tensor, logits: torch.Tensor, class_names: Sequence[str] | None
    ) -> torch.Tensor:
        baked = self.baked(class_names)
        return logits if isinstance(baked, nn.Identity) else baked(image_embeds, logits)

    def baked(self, class_names: Sequence[str] | None) -> nn.Module:
        active = self._active_head()
        if active is None or class_names is None:
            return nn.Identity()
        return active[0].baked(places_of(class_names, active[1]))

    @property
    def adds_to_loss(self) -> bool:
        config = self.adapter_config
        return config is not None and config.pull

    def loss_terms(self) -> dict[str, torch.Tensor]:
        active = self._active_head()
        return {} if active is None else active[0].loss_terms()

    def _names_in_effect(self) -> list[str] | None:
        names = [name for name in self.active_adapters if name in self.names_in_use and not self.disable_adapters]
        return self.names_in_use[names[0]] if names else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_OBSTACLE)

    def unmerge(self) -> None:
        """Does nothing, since nothing is ever merged here."""

    def __repr__(self) -> str:
        return "class_head." + super().__repr__()


def places_of(class_names: Sequence[str], config: ClassHeadConfig) -> list[int | None]:
    """Returns the row of each class in a head, or `None` for classes that it does not know."""
    rows = {name: row for row, name in enumerate(config.class_names)}
    return [rows.get(name) for name in class_names]
