"""The parts of a CLIP and its kin, found by what they are and not by what the model is called.

All are two towers, `text_model` and `vision_model`, with or without projections behind them. Their text embeddings are
a token table plus a position table; what else they add (token types, a LayerNorm) is their own affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


TOKEN_TABLES = ("token_embedding", "word_embeddings")  # as CLIP and as BERT call them


POSITION_TABLES = ("position_embedding", "position_embeddings")


def text_side(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that text embeddings are made by."""
    return _present(model, "text_model", "text_projection")


def image_side(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that image embeddings are made by."""
    return _present(model, "vision_model", "visual_projection")


def embed_width(config) -> int | None:
    """E, the width that image and text embeddings share; `None` for the config of a model that has no such thing."""
    width = getattr(config, "projection_dim", None)
    return getattr(getattr(config, "text_config", None), "projection_size", None) if width is None else width


def text_embeddings_of(text_model: nn.Module) -> nn.Module:
    """The embeddings of a text tower, which may be a head on top of a language model that has them (AltCLIP)."""
    return text_model.base_model.embeddings


def token_table_name(embeddings: nn.Module) -> str | None:
    """What text embeddings call their token table (V, D); `None` without one."""
    return _name_of_table(embeddings, TOKEN_TABLES)


def position_table_name(embeddings: nn.Module) -> str | None:
    """What text embeddings call their position table; `None` without one."""
    return _name_of_table(embeddings, POSITION_TABLES)


def is_text_embeddings(module: nn.Module | None, token_tables: tuple[str, ...] = TOKEN_TABLES) -> bool:
    """Whether `module` looks like text embeddings: one token table, of such a name, plus one position table."""
    return token_table_name(module) in token_tables and position_table_name(module) is not None


def first_position_row(embeddings: nn.Module) -> int:
    """Row of the position table that belongs to the first token: in RoBERTa the one behind that of the padding."""
    padding_row = getattr(embeddings, position_table_name(embeddings)).padding_idx
    return 0 if padding_row is None else padding_row + 1


def num_positions(embeddings: nn.Module) -> int:
    """How many tokens a text may have."""
    return getattr(embeddings, position_table_name(embeddings)).num_embeddings - first_position_row(embeddings)


def _present(model: nn.Module, *names: str) -> tuple[nn.Module, ...]:
    return tuple(part for name in names if (part := getattr(model, name, None)) is not None)


def _name_of_table(embeddings, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(embeddings, name, None), nn.Embedding)), None)


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


ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


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


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode; every module goes back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
