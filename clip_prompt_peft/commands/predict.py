#!/usr/bin/env python
"""Classifies image files with a tuned prompt.

    python predict.py outputs/prompt_tuning/seed1 cat.jpg pictures/
    python predict.py user/pets-prompts cat.jpg --top_k 5

A folder stands for the images in it. A file that cannot be read is reported, and the others are classified all the
same; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from .. import AutoPeftModelForPromptClassification
from ..evaluation.tables import aligned


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    paths = find_images(args.images)
    try:
        model = AutoPeftModelForPromptClassification.from_pretrained(args.adapter, base_model_name_or_path=args.base)
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: error: {error}")
    model.eval().to(args.device)
    image_processor = AutoImageProcessor.from_pretrained(model.get_base_model().name_or_path, trust_remote_code=False)

    rows, unreadable = [], []
    for batch in batches(paths, args.batch_size):
        images = {}
        for path in batch:
            try:
                images[path] = read(path)
            except OSError as error:  # PIL's error for what is no image is one, too
                unreadable.append(f"{path}: {reason(error)}")
        if images:
            rows += classify(model, image_processor, images, args.top_k)
    if rows:
        print(aligned([["image"] + ["label", "probability"] * (len(rows[0]) // 2), *rows]))
    if unreadable:
        sys.exit("\n".join(["", f"Could not read {len(unreadable)} of {len(paths)} files:", *unreadable]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classifies image files with a tuned prompt.")
    parser.add_argument("adapter", help="folder or Hub id of the adapter, such as outputs/prompt_tuning/seed1")
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--top_k", type=int, default=1, help="how many labels to show for each image")
    parser.add_argument("--base", help="base model, if not where the adapter says it is")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    args = parser.parse_args()
    if args.top_k < 1 or args.batch_size < 1:
        parser.error("--top_k and --batch_size must be 1 or more")
    return args


def find_images(paths: list[Path]) -> list[Path]:
    """The files named, and the image files inside of the folders named."""
    endings = Image.registered_extensions()
    found = []
    for path in paths:
        inside = (
            sorted(file for file in path.rglob("*") if file.suffix.lower() in endings) if path.is_dir() else [path]
        )
        if not inside:
            sys.exit(f"predict.py: error: there are no images in {path}")
        found += inside
    return found


def batches(paths: list[Path], size: int) -> Iterator[list[Path]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))


def read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else "not an image, or damaged"


@torch.no_grad()
def classify(model, image_processor, images: dict[Path, Image.Image], top_k: int) -> list[list[str]]:
    """A row for each image: its path, and `top_k` labels with their probabilities."""
    inputs = image_processor(list(images.values()), return_tensors="pt").to(model.device)
    probabilities = model(**inputs).logits.softmax(dim=-1)  # (B, C)
    id2label = model.config.id2label
    values, labels = probabilities.topk(min(top_k, len(id2label)))
    return [
        [str(path)] + [text for value, label in zip(*row) for text in (id2label[label], f"{value:.1%}")]
        for path, row in zip(images, zip(values.tolist(), labels.tolist()))
    ]


if __name__ == "__main__":
    main()
