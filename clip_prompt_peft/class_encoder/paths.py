"""Which way of encoding class prompts is exact for a model: asked of the model and the prompts, never of a name."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPModel

from ..class_prompts import ClassPrompts, PromptLayout
from .rows import PackedRows, PlainRows, pack_rows, plain_rows, run_tower
from .surroundings import Surroundings


PACKED, CUT, PLAIN = "packed", "cut", "plain"
PATHS = (PACKED, CUT, PLAIN)  # from the fastest to the one that assumes nothing

# Attention kernels that add a mask to the scores as it is; others want masks of their own kind, or none.
ADDITIVE_MASKS = ("eager", "sdpa")


def fastest_exact_path(model: CLIPModel, prompts: ClassPrompts) -> str:
    """`"packed"`, `"cut"` or `"plain"`: the first that gives what the plain path gives.

    - `plain`: every prompt in a row of its own, padded to all positions of the tower. Always right.
    - `cut`: rows end with the longest prompt. Right where a token sees only those before it.
    - `packed`: many prompts a row, behind the positions that they share. Right where, besides, the attention takes any
      mask.
    """
    attention, is_run_by_others = run_state(model.text_model)
    if is_run_by_others or not sees_backwards_only(model.text_model, prompts.input_ids.shape[1]):
        return PLAIN
    return PACKED if attention in ADDITIVE_MASKS else CUT


def run_state(text_model: nn.Module) -> tuple[str, bool]:
    """The attention implementation, and whether calling the model runs something else than its class's `forward`:
    accelerate's hooks on a model that is spread over devices, `text_model.compile()`. [`run_tower`] would pass by it.
    """
    is_run_by_others = "forward" in vars(text_model) or getattr(text_model, "_compiled_call_impl", None) is not None
    return text_model.config._attn_implementation, is_run_by_others


@torch.no_grad()
def sees_backwards_only(text_model: nn.Module, length: int) -> bool:
    """Whether the states of a text of that length stay what they are when its last token changes. Found by trying."""
    shape = (2, length, text_model.config.hidden_size)
    embeds = (
        torch.linspace(-1, 1, length * shape[2], device=text_model.device, dtype=text_model.dtype)
        .expand(2, -1)
        .view(shape)
    )
    changed = embeds.clone()
    changed[0, -1] = 0
    mask = torch.ones(shape[:2], dtype=torch.long, device=text_model.device)
    mask[1, -1] = 0  # without some padding, no mask at all would reach the attention
    surroundings = Surroundings(embeds)
    states = []
    for rows in (embeds, changed):
        with surroundings.random_state():  # dropout, if there is any, drops the same in both
            states.append(run_tower(text_model, rows, mask)[0, :-1])  # (L - 1, D)
    return torch.allclose(*states)


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
    length = text_model.config.max_position_embeddings if path == PLAIN else prompts.input_ids.shape[1]
    return plain_rows(classes, prompts, length, device)
