"""The parts of a CLIP and its kin, found by what they are and not by what the model is called.

All are two towers, `text_model` and `vision_model`, with or without projections behind them. Their text embeddings are
a token table plus a position table; what else they add (token types, a LayerNorm) is their own affair.
"""

from __future__ import annotations

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
