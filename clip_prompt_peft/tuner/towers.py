"""Finds the towers of a CLIP or of its kin, by structure.

Paths and class names differ between transformers versions and families; the parts do not: a tower is a module with
`embeddings` and with `encoder.layers`, or `encoder.layer` as in BERT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..dual_encoder import TOKEN_TABLES, is_text_embeddings, position_table_name, token_table_name


LAYER_LISTS = ("layers", "layer")


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


def is_vision_embeddings(module: nn.Module | None) -> bool:
    """Whether `module` looks like a CLIP's image embeddings: patches plus a position table."""
    return all(
        isinstance(getattr(module, name, None), nn.Module) for name in ("patch_embedding", "position_embedding")
    )


def takes_patches(embeddings: nn.Module) -> bool:
    """Whether image embeddings take patches, with a mask of those that are there, in place of an image (NaFlex)."""
    return isinstance(embeddings.patch_embedding, nn.Linear)


def find_towers(model: nn.Module, kind: str) -> list[Tower]:
    """
    Args:
        model: to search.
        kind: `"text"` or `"vision"`.
    """
    if kind == "text":
        # by itself, a language model is just that
        names = TOKEN_TABLES if any(map(is_vision_embeddings, model.modules())) else TOKEN_TABLES[:1]
        is_embeddings, table_name = (lambda module: is_text_embeddings(module, names)), token_table_name
    else:
        is_embeddings, table_name = is_vision_embeddings, position_table_name
    return [
        _tower(model, key, getattr(module, table_name(module)).weight)
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
    name = next((name for name in LAYER_LISTS if getattr(encoder, name, None) is not None), None)
    if name is None:
        return Tower(embeddings_key, [], like)
    prefix = f"{path}.encoder.{name}" if path else f"encoder.{name}"
    return Tower(embeddings_key, [f"{prefix}.{i}" for i in range(len(getattr(encoder, name)))], like)
