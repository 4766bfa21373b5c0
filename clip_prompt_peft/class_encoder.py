"""From class prompts to class embeddings."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from .class_prompts import ClassPrompts


def encode_class_prompts(model: CLIPModel, prompts: ClassPrompts) -> torch.Tensor:
    """Runs the text tower over the prompts, with whatever adapter is active in it.

    The prompts are cut after the longest one's end token, which is exact: CLIP's text tower attends backwards only.

    Args:
        model: a CLIP with a text tower.
        prompts: of C classes.

    Returns:
        (C, E) class embeddings, L2-normalised, in float32 at least.
    """
    outputs = model.get_text_features(
        input_ids=prompts.input_ids.to(model.device), attention_mask=prompts.attention_mask.to(model.device)
    )
    return normalize(outputs.pooler_output)


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Divides by the L2 norm over the last dimension, in float32 at least: squares overflow in half precision."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return embeds / embeds.norm(dim=-1, keepdim=True)
