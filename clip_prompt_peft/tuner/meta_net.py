"""The network that makes text vectors depend on the image (CoCoOp)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .prompt_layer import trainable_dtype


BOTTLENECK = 16  # CoCoOp, trainers/cocoop.py: hidden width = width of the image embedding // 16


def build_meta_net(image_width: int, like: torch.Tensor, draw: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """The two linear maps from a normalised image embedding (B, E) to a shift of the vectors (B, D).

    Args:
        image_width: E.
        like: token embeddings (..., D), for width, device and dtype.
        draw: `False` if values are about to be loaded; nothing is drawn from the random number generator then.

    Raises:
        ValueError: if E is smaller than 16, which leaves no hidden units.
    """
    hidden = image_width // BOTTLENECK
    if hidden < 1:
        raise ValueError(
            f"image_conditioned needs image embeddings of at least {BOTTLENECK} dimensions (the hidden layer has a "
            f"{BOTTLENECK}th of them); this model's have {image_width}."
        )
    return build_linear(image_width, hidden, like, draw), build_linear(hidden, like.shape[-1], like, draw)


def run_meta_net(first: nn.Linear, second: nn.Linear, image_embeds: torch.Tensor) -> torch.Tensor:
    """(B, D) shift of the vectors for (B, E) image embeddings."""
    return second(first(image_embeds.to(first.weight)).relu())


def build_linear(width_in: int, width_out: int, like: torch.Tensor, draw: bool = True) -> nn.Linear:
    """A linear layer on the device of `like`, in float32 at least; initialised if `draw`."""
    options = {"device": like.device, "dtype": trainable_dtype(like)}
    make = nn.Linear if draw else partial(nn.utils.skip_init, nn.Linear)
    return make(width_in, width_out, **options)
