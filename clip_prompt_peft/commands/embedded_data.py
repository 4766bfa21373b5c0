"""The CLIP and the pictures that come with the examples, so that they run without network.

Where both come from, and what they are good for, is told in assets/ATTRIBUTION.md.
"""

from pathlib import Path

import torch
from datasets import DatasetDict

from clip_prompt_peft.data import load_image_dataset


ASSETS = Path(__file__).resolve().parent / "assets"
TINY_CLIP = str(ASSETS / "tiny_clip")
STYLES = ("fluenthc", "noto", "fluent3d")
SPLITS = ("train", "test")


def load_style(style: str) -> DatasetDict:
    """Emoji of 12 classes, drawn in one style: about 187 for training (`train`) and 267 others (`test`)."""
    return load_image_dataset(files={split: str(ASSETS / "emoji" / f"{style}-{split}.parquet") for split in SPLITS})


def use_one_thread_if_tiny(model_name_or_path: str) -> None:
    """The tiny CLIP gains nothing from more threads; on a busy machine their waiting for each other makes it slow."""
    if model_name_or_path == TINY_CLIP:
        torch.set_num_threads(1)
