"""The tokenizer and the image processor of an open_clip model, from its configuration."""

from __future__ import annotations

import gzip
import re
import string
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import BaseImageProcessor, CLIPImageProcessorPil, CLIPTokenizer, SiglipImageProcessorPil

from ..assets import CLIP_MERGES
from .config import OpenClipConfig


BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
START, END = "<|startoftext|>", "<|endoftext|>"
SPACES = normalizers.Replace(Regex(r"\s+"), " ")
CLEANED = {
    "whitespace": [SPACES, normalizers.Strip()],
    "lower": [SPACES, normalizers.Strip(), normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Lowercase(),
        SPACES,
        normalizers.Strip(),
    ],
}


def has_own_tokenizer(config: OpenClipConfig) -> bool:
    """Whether the model reads texts with OpenAI's byte pairs, as open_clip does unless a tokenizer is named."""
    return not config.text["hf_tokenizer_name"] and config.text["vocab_size"] >= 49408


def make_tokenizer(config: OpenClipConfig) -> CLIPTokenizer:
    """Returns OpenAI's tokenizer of CLIP, made of the byte pairs that come with this package."""
    merges: Any = [tuple(line.split()) for line in gzip.decompress(CLIP_MERGES.read_bytes()).decode().splitlines()]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    tokens = [*characters, *(f"{char}</w>" for char in characters), *map("".join, merges), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return prepared(CLIPTokenizer(vocab=vocab, merges=merges), config, default="lower")


def prepared(tokenizer, config: OpenClipConfig, default: str = "whitespace"):
    """Sets up a tokenizer to clean and to cut texts as open_clip does.

    Args:
        tokenizer:
            The tokenizer.
        config (`OpenClipConfig`):
            The configuration. Of its `tokenizer_kwargs`, `clean` can be followed.
        default (`str`, *optional*, defaults to `"whitespace"`):
            How texts are cleaned if the configuration does not say it.

    Raises:
        ValueError: If the configuration asks for something else.
    """
    settings = dict(config.text["tokenizer_kwargs"] or {})
    clean = settings.pop("clean", default)
    if settings or clean not in CLEANED:
        raise ValueError(
            f"text_cfg.tokenizer_kwargs {config.text['tokenizer_kwargs']} of open_clip cannot be followed; only "
            f"'clean' is known, with {', '.join(CLEANED)}. Pass tokenizer=..."
        )
    tokenizer.model_max_length = config.text["context_length"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the others, such as SigLIP's own, clean texts by themselves
        steps = [*CLEANED[clean], *([backend.normalizer] if backend.normalizer is not None else [])]
        backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def make_image_processor(config: OpenClipConfig) -> BaseImageProcessor:
    """Returns the image processor of open_clip's evaluation.

    Where an odd number of rows or columns is cropped, transformers can leave the picture one pixel off from
    torchvision.
    """
    settings, side = config.preprocess, config.image_size
    square = {"height": side, "width": side}
    common: dict[str, Any] = {
        "image_mean": _three(settings["mean"]),
        "image_std": _three(settings["std"]),
        "resample": BILINEAR if settings["interpolation"] == "bilinear" else BICUBIC,
    }
    if settings["resize_mode"] == "squash":
        return SiglipImageProcessorPil(size=square, **common)
    if settings["resize_mode"] == "longest":  # the crop fills up with black
        return CLIPImageProcessorPil(size={"max_height": side, "max_width": side}, crop_size=square, **common)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **common)


def _three(value) -> list[float]:
    return [float(x) for x in value] if isinstance(value, (list, tuple)) else [float(value)] * 3
