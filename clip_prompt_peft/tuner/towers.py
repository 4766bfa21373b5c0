"""Finds the towers of a CLIP, by structure.

Paths and class names differ between transformers versions and members of the family; the parts do not: a tower is a
module with `embeddings` and `encoder.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Tower:
    """
    Attributes:
        embeddings_key: path of its embeddings.
        layer_keys: paths of its encoder layers.
        like: a tensor of the embeddings (..., D), for hidden size, device and dtype.
    """

    embeddings_key: str
    layer_keys: list[str]
    like: torch.Tensor


def is_clip_text_embeddings(module: nn.Module | None) -> bool:
    """Whether `module` looks like CLIP's text embeddings: one token table plus one position table."""
    return all(
        isinstance(getattr(module, name, None), nn.Embedding) for name in ("token_embedding", "position_embedding")
    )


def is_clip_vision_embeddings(module: nn.Module | None) -> bool:
    """Whether `module` looks like CLIP's image embeddings: patches, a class token and a position table."""
    parts = ("patch_embedding", "class_embedding", "position_embedding")
    return all(isinstance(getattr(module, name, None), (nn.Module, nn.Parameter)) for name in parts)


def find_towers(model: nn.Module, kind: str) -> list[Tower]:
    """
    Args:
        model: to search.
        kind: `"text"` or `"vision"`.
    """
    is_embeddings, like = {
        "text": (is_clip_text_embeddings, lambda module: module.token_embedding.weight),
        "vision": (is_clip_vision_embeddings, lambda module: module.class_embedding),
    }[kind]
    return [
        _tower(model, key, like(module))
        for key, module in model.named_modules()
        # a tuner layer answers for the module that it wraps
        if is_embeddings(module) and not key.endswith("base_layer")
    ]


def num_tower_layers(model: nn.Module, kind: str) -> int | None:
    """The least number of encoder layers among the towers of a kind; `None` without one."""
    return min((len(tower.layer_keys) for tower in find_towers(model, kind)), default=None)


def _tower(model: nn.Module, embeddings_key: str, like: torch.Tensor) -> Tower:
    path = embeddings_key.rpartition(".")[0]
    encoder = getattr(model.get_submodule(path), "encoder", None)
    prefix = f"{path}.encoder" if path else "encoder"
    layers = getattr(encoder, "layers", None) or []
    return Tower(embeddings_key, [f"{prefix}.layers.{i}" for i in range(len(layers))], like)
