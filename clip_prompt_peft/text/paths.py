"""Which way of encoding class prompts is exact for a model: asked of the model and the prompts, never of a name."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import nn
from transformers import CLIPModel

from ..class_prompts import ClassPrompts, PromptLayout
from ..dual_encoder import text_embeddings_of
from .adapter_settings import adapter_settings
from .rows import PackedRows, PlainRows, additive_mask, backwards, own_vectors, pack_rows, plain_rows, run_encoder
from .surroundings import Surroundings


PACKED, CUT, PLAIN = "packed", "cut", "plain"
PATHS = (PACKED, CUT, PLAIN)  # from the fastest to the one that assumes nothing

# Attention kernels that add a mask to the scores as it is; others want masks of their own kind, or none.
ADDITIVE_MASKS = ("eager", "sdpa")


def what_decides(model: CLIPModel, layout: PromptLayout | None) -> Hashable:
    """All that the fastest exact path depends on, so that it need not be found out again where this is the same."""
    text_model = model.text_model
    modules = list(text_model.modules())
    kind = None if layout is None else (layout.start_idx, layout.num_virtual_tokens, layout.has_row_vectors)
    settings = (attention_of(text_model), text_model.dtype, text_model.device, kind, repr(adapter_settings(modules)))
    return tuple(map(weakref.ref, modules)), settings


@torch.no_grad()
def fastest_exact_path(model: CLIPModel, prompts: ClassPrompts) -> str:
    """`"packed"`, `"cut"` or `"plain"`: the first that gives what the plain path gives. Found out by trying.

    - `plain`: every prompt in a row of its own, padded to `prompts.full_length`. Always right.
    - `cut`: rows end with the longest prompt. Right where a token sees only those before it.
    - `packed`: many prompts a row, behind the positions that they share. Right where, besides, the attention takes any
      mask, and the text model does nothing but embed, encode and normalise.
    """
    text_model = model.text_model
    row = build_rows(PLAIN, torch.tensor([0]), prompts, 0, text_model)  # the prompt of the first class
    surroundings = Surroundings(row.input_ids)
    with torch.autocast(row.input_ids.device.type, enabled=False):  # less precision, less to be told by comparing
        with surroundings.random_state():  # dropout, if there is any, drops the same each time
            states = _states(text_model, row)
        with surroundings.random_state():
            states_of_other_end = _states(text_model, _with_another_end(row))
        if not torch.allclose(states[:, :-1], states_of_other_end[:, :-1]):
            return PLAIN
        if attention_of(text_model)[0] not in ADDITIVE_MASKS:
            return CUT
        with surroundings.random_state():
            states_by_parts = _states_by_parts(text_model, row)
    error = (states_by_parts - states).abs().max() / states.abs().max()
    return PACKED if error < torch.finfo(states.dtype).eps ** 0.5 else CUT


def attention_of(text_model: nn.Module) -> tuple[str, bool]:
    """The implementation of its attention, and whether transformers makes its masks causal."""
    return text_model.config._attn_implementation, getattr(text_model.config, "is_causal", True)


def _states(text_model: nn.Module, row: PlainRows) -> torch.Tensor:
    """(1, tokens of the prompt, D)"""
    with own_vectors(text_model, row, _any_image_vectors(text_model)):
        states = text_model(input_ids=row.input_ids, attention_mask=row.attention_mask).last_hidden_state
    return states[:, : int(row.attention_mask.sum())]


def _states_by_parts(text_model: nn.Module, row: PlainRows) -> torch.Tensor:
    """(1, tokens of the prompt, D), in the way of packed rows"""
    with own_vectors(text_model, row, _any_image_vectors(text_model)):
        embeds = text_embeddings_of(text_model)(input_ids=row.input_ids)
    visible = backwards(embeds.shape[1], embeds.device)[None]
    states = run_encoder(text_model, embeds, additive_mask(visible, embeds.dtype))
    return states[:, : int(row.attention_mask.sum())]


def _any_image_vectors(text_model: nn.Module) -> torch.Tensor | None:
    """(1, n, D) for an adapter that is conditioned on the image: those that no image has shifted."""
    layout = getattr(text_embeddings_of(text_model), "prompt_layout", None)
    is_conditioned = layout is not None and layout.image_conditioned
    return text_embeddings_of(text_model).row_vectors()[None] if is_conditioned else None


def _with_another_end(row: PlainRows) -> PlainRows:
    """The begin token in place of the last one."""
    input_ids = row.input_ids.clone()
    input_ids[0, int(row.attention_mask.sum()) - 1] = input_ids[0, 0]
    return replace(row, input_ids=input_ids)


def num_shared_positions(prompts: ClassPrompts, layout: PromptLayout | None) -> int:
    """How many positions, from the begin token on, hold the same in all prompts: P.

    Those whose token ids are equal; fewer if the layout says that vectors differ between classes.
    """
    same = (prompts.input_ids == prompts.input_ids[0]).all(dim=0)  # (L,)
    num_equal = int(same.long().cumprod(dim=0).sum())
    at_most = getattr(layout, "num_shared_positions", None)
    return num_equal if at_most is None else min(num_equal, at_most)


def build_rows(
    path: str, classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, text_model: nn.Module
) -> PlainRows | PackedRows:
    """The rows in which `path` encodes these classes (K,)."""
    device = text_model.device
    if path == PACKED:
        return pack_rows(classes, prompts, num_shared, device)
    length = prompts.full_length if path == PLAIN else prompts.input_ids.shape[1]
    return plain_rows(classes, prompts, length, device)
