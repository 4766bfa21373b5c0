"""From class prompts to class embeddings."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel

from .class_prompts import ClassPrompts


ROWS_AT_ONCE = 256  # texts in one call, where there are as many as images times classes


def encode_class_prompts(
    model: CLIPModel, prompts: ClassPrompts, image_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the text tower over the prompts, with whatever adapter is active in it.

    The prompts are cut after the longest one's end token, which is exact: CLIP's text tower attends backwards only.

    Args:
        model: a CLIP with a text tower.
        prompts: of C classes.
        image_embeds: (B, E), L2-normalised, for an adapter that is conditioned on the image.

    Returns:
        (C, E) class embeddings, L2-normalised, in float32 at least; (B, C, E) if conditioned on the image.
    """
    layout = getattr(model.text_model.embeddings, "prompt_layout", None)
    if layout is None or not (layout.has_row_vectors or layout.has_row_positions):
        return _encode(model, prompts)
    vectors = model.text_model.embeddings.row_vectors(image_embeds)  # (C, n, D) or (B, n, D)
    if not layout.image_conditioned:
        return _encode(model, prompts, vectors)
    parts = vectors.split(max(1, ROWS_AT_ONCE // len(prompts.texts)))
    if len(parts) == 1:
        return _encode_images(model, prompts, vectors)
    # computed again for the gradient, so that memory does not grow with the number of images
    return torch.cat([checkpoint(_encode_images, model, prompts, part, use_reentrant=False) for part in parts])


def _encode_images(model, prompts, vectors) -> torch.Tensor:
    num_images, num_classes = len(vectors), len(prompts.texts)
    positions = prompts.context_positions
    repeated = ClassPrompts(
        prompts.texts * num_images,
        prompts.input_ids.repeat(num_images, 1),
        prompts.attention_mask.repeat(num_images, 1),
        None if positions is None else positions.repeat(num_images, 1),
    )
    embeds = _encode(model, repeated, vectors.repeat_interleave(num_classes, dim=0))  # (B C, E)
    return embeds.view(num_images, num_classes, -1)


def _encode(model, prompts, vectors=None) -> torch.Tensor:
    """(C, E), with `vectors` (C, n, D) of each text if the adapter has such."""
    positions = prompts.context_positions
    rows = nullcontext()
    if vectors is not None or positions is not None:
        positions = None if positions is None else positions.to(model.device)
        rows = model.text_model.embeddings.rows(vectors, positions)
    with rows:
        outputs = model.get_text_features(
            input_ids=prompts.input_ids.to(model.device), attention_mask=prompts.attention_mask.to(model.device)
        )
    return normalize(outputs.pooler_output)


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Divides by the L2 norm over the last dimension, in float32 at least: squares overflow in half precision."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return embeds / embeds.norm(dim=-1, keepdim=True)
