"""Packed class prompts for an adapter that puts vectors of each class into a deeper layer (TCP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPModel

from ..tuner.layout import PromptLayout
from ..tuner.vectors import PerClass
from .packing import PREFIX, PackedPrompts, class_aware_layer_of, num_shared_positions, pack_prompts
from .prompts import ClassPrompts


@dataclass(frozen=True)
class ClassAwarePrompts:
    """
    The prompts of a chunk of classes, packed in two ways.

    Below the `class_aware_layer`, the learnable vectors belong to the prefix that all classes share. From it on, every
    class has its own, so only the tokens in front of them are shared. Between the two, states move to the places of
    the second packing.

    Attributes:
        shared: The prompts for the layers below, with R sequences of T tokens.
        own: The prompts for the other layers, with R' sequences of T' tokens.
        layer: The index of the first of these layers.
        moved: (R', T') index of each token of `own` in the flattened sequences of `shared`.
        vector_index: (K, n) index of the vectors of each class in the flattened sequences of `own`.
    """

    shared: PackedPrompts
    own: PackedPrompts
    layer: int
    moved: torch.LongTensor
    vector_index: torch.LongTensor

    @property
    def classes(self) -> torch.LongTensor:
        """(K,) indices of the classes."""
        return self.own.classes

    def encode(
        self,
        model: CLIPModel,
        layout: PromptLayout,
        image_vectors: torch.Tensor | None = None,
        class_priors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the class embeddings (1, K, E), equal to those of [`~packing.PlainPrompts`]."""
        layers = model.text_model.encoder.layers
        states = self.shared.embed(model, layout)  # (R, T, D)
        mask = self.shared.attention_mask(states.dtype)
        for layer in layers[: self.layer]:
            states = layer(states, mask)
        states = states.flatten(0, 1).index_select(0, self.moved.flatten()).view(*self.moved.shape, -1)  # (R', T', D)
        mask = self.own.attention_mask(states.dtype)
        vectors = class_aware_layer_of(model.text_model).class_vectors(class_priors[self.classes])  # (K, n, D)
        states = layers[self.layer](states, mask, per_class=PerClass(vectors, self.vector_index))
        for layer in layers[self.layer + 1 :]:
            states = layer(states, mask)
        return self.own.pool(model, states)


def class_aware_places(layout: PromptLayout | None) -> tuple[int, int, int] | None:
    """Returns where vectors of the classes come in: the layer, the first position, and the one after the last."""
    if layout is None or layout.class_aware_layer is None:
        return None
    return layout.class_aware_layer, layout.start_idx, layout.end_idx


def fewest_shared_positions(prompts: ClassPrompts, layout: PromptLayout | None) -> int:
    """Returns [`~packing.num_shared_positions`] of the layers where classes have the least in common."""
    num_shared, places = num_shared_positions(prompts, layout), class_aware_places(layout)
    return num_shared if places is None else min(num_shared, places[1])


def pack_class_aware(
    classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, layout: PromptLayout, device: torch.device
) -> ClassAwarePrompts:
    """Packs the prompts of a chunk of classes (K,) for an adapter with a `class_aware_layer`.

    Args:
        classes, prompts, num_shared, device:
            The arguments of [`~packing.pack_prompts`].
        layout (`PromptLayout`):
            The layout of the adapter.
    """
    shared = pack_prompts(classes, prompts, num_shared, torch.device("cpu"))
    own = pack_prompts(classes, prompts, min(num_shared, layout.start_idx), torch.device("cpu"))
    lengths = prompts.attention_mask[classes].sum(dim=1)  # (K,)
    moved = _places(shared, lengths).flatten()[own.token_index]
    vector_index = _places(own, lengths)[:, layout.start_idx : layout.end_idx]
    shared, own = (packed.to(device) for packed in (shared, own))
    return ClassAwarePrompts(shared, own, layout.class_aware_layer, moved.to(device), vector_index.to(device))


def _places(packed: PackedPrompts, lengths: torch.LongTensor) -> torch.LongTensor:
    """Returns (K, L): where each token of each prompt is in the flattened packed sequences. Padding is anywhere."""
    num_shared = int((packed.segment[0] == PREFIX).sum())
    length = packed.segment.shape[1]  # T
    position = torch.arange(packed.input_ids.shape[1])  # (L,)
    in_prefix = packed.end_index[:, None] // length * length + position
    in_suffix = packed.end_index[:, None] - (lengths[:, None] - 1 - position)
    return torch.where(position < num_shared, in_prefix, in_suffix).clamp(max=packed.segment.numel() - 1)
