"""What predictions for several views of an image say: their entropies, and which views to rely on.

Shapes: `B` images with `V` views each, of which `K` are kept; `C` classes, `E` the width of embeddings.
"""

from __future__ import annotations

import math

import torch


NUM_NEIGHBORS = 20  # R-TPT: a view is as reliable as it is similar to so many others
RELIABILITY_TEMPERATURE = 0.01


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Returns the entropies (...), in nats, of predictions (..., C)."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def entropy_of_mean(logits: torch.Tensor) -> torch.Tensor:
    """Returns the entropies (B,) of the mean predictions for K views each, (B, K, C)."""
    mean = logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])  # of the probabilities, as a log
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean.exp() * mean).sum(dim=-1)


def dispersion(class_embeds: torch.Tensor) -> torch.Tensor:
    """Returns the mean distances (B,) of the class embeddings (B, C, E) from their mean."""
    return (class_embeds - class_embeds.mean(dim=1, keepdim=True)).norm(dim=-1).mean(dim=-1)


def view_weights(image_embeds: torch.Tensor, similarity: torch.Tensor | None = None) -> torch.Tensor:
    """Returns how reliable each view is, (B, V), with a sum of 1, by its similarity to the most similar others."""
    if similarity is None:
        similarity = image_embeds @ image_embeds.mT  # (B, V, V)
        itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    else:
        similarity = similarity.to(image_embeds)
        itself = similarity >= 1
    nearest = similarity.masked_fill(itself, -math.inf).topk(NUM_NEIGHBORS, dim=-1).values
    return (nearest.mean(dim=-1) / RELIABILITY_TEMPERATURE).softmax(dim=-1)


def check_number_of_views(num_views: int, selection: float) -> int:
    """Returns how many views are kept; raises `ValueError` if there is none."""
    num_kept = int(num_views * selection)
    if num_kept < 1:
        raise ValueError(
            f"Of {num_views} views of an image, selection={selection} keeps none; give at least "
            f"{math.ceil(1 / selection)} views, or a larger selection."
        )
    return num_kept
