"""The image towers of SigLIP in timm: their sizes and activations, which open_clip's configurations only name."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Trunk:
    """
    An image tower of timm with attention pooling and no class token.

    Args:
        width (`int`): The width.
        layers (`int`): The number of layers.
        heads (`int`): The number of attention heads.
        intermediate_size (`int`): The width of the hidden layer of the feed-forward parts.
        patch_size (`int`): The side of a patch in pixels.
        image_size (`int`): The side of an image in pixels.
        hidden_act (`str`): The activation, by its name in transformers.
    """

    width: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    hidden_act: str


SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
GELU, TANH = "gelu", "gelu_pytorch_tanh"
# The activation of each tower. timm has no rule for it: neighbors of the same size differ.
ACTIVATIONS = {
    "vit_base_patch32_siglip_256": TANH,
    "vit_base_patch16_siglip_224": GELU,
    "vit_base_patch16_siglip_256": GELU,
    "vit_base_patch16_siglip_384": GELU,
    "vit_base_patch16_siglip_512": GELU,
    "vit_large_patch16_siglip_256": GELU,
    "vit_large_patch16_siglip_384": GELU,
    "vit_large_patch16_siglip_512": TANH,
    "vit_so400m_patch14_siglip_224": GELU,
    "vit_so400m_patch14_siglip_378": GELU,
    "vit_so400m_patch14_siglip_384": GELU,
    "vit_so400m_patch16_siglip_256": TANH,
    "vit_so400m_patch16_siglip_384": TANH,
    "vit_so400m_patch16_siglip_512": TANH,
    "vit_giantopt_patch16_siglip_256": TANH,
    "vit_giantopt_patch16_siglip_384": TANH,
}


def _trunk(name: str, hidden_act: str) -> Trunk:
    size, patch_size, image_size = re.fullmatch(r"vit_(\w+)_patch(\d+)_siglip_(\d+)", name).groups()
    return Trunk(*SIZES[size], int(patch_size), int(image_size), hidden_act)


TRUNKS = {name: _trunk(name, hidden_act) for name, hidden_act in ACTIVATIONS.items()}


def trunk_of(timm_model_name: str) -> Trunk | None:
    """Returns the image tower of a name of timm, whose tag of weights (`.webli`) does not count."""
    return TRUNKS.get(timm_model_name.partition(".")[0])
