"""The command `predict`: classifies image files with a tuned prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging

from clip_prompt_cli.parsers import parse

from ..evaluation.conformal import ConformalClassifier
from ..evaluation.tables import aligned, counted
from ..image_files import UnreadableImageError, decode_image, list_images, process_images, skipped_files
from .adapters import find_adapter, load_adapter
from .common import check_device, errors_in_one_line, stopped_in_one_line
from .test_time import adapted


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("predict", arguments)
    lines: list[list[str]] = []
    with stopped_in_one_line(lambda: show(lines)):
        predict(args, lines)


def predict(args: argparse.Namespace, lines: list[list[str]]) -> None:
    """Does everything; the lines of the table are added to `lines`."""
    with errors_in_one_line():
        check_device(args.device)
        adapter = find_adapter(args.adapter)
        paths = [file for path in args.images for file in find_images(path)]
        if args.coverage is not None and args.top_k is not None:
            raise ValueError("With --coverage, the answer is a set of any size; leave out --top_k.")
        if args.coverage is not None and args.test_time is not None:
            raise ValueError("The coverage of sets holds for answers that are not adapted; leave out --test_time.")
        model, image_processor = load_adapter(adapter, args)
        answer = None if args.test_time is None else adapted(args.test_time, model, image_processor)
        conformal = None if args.coverage is None else ConformalClassifier(model, image_processor)
        if conformal is not None and (told := conformal.scores.too_few(args.coverage)) is not None:
            print(told, file=sys.stderr)
    unreadable = []
    starts = range(0, len(paths), args.batch_size)
    for start in logging.tqdm(starts, desc="Classifying", delay=2, leave=False, disable=None):  # None: no terminal
        images = {}
        for path in paths[start : start + args.batch_size]:
            try:
                images[path] = decode_image(path)
            except UnreadableImageError as error:
                unreadable.append(str(error))
        if images and conformal is not None:
            lines += classify_in_sets(conformal, image_processor, images, args.coverage)
        elif images:
            lines += classify(model, image_processor, images, args.top_k or 1, answer)
    show(lines)
    if unreadable:
        number = f"{len(unreadable)} of {counted(len(paths), 'file')}"
        sys.exit("\n".join(["", f"Could not read {number}:", *unreadable]))


def show(lines: list[list[str]]) -> str:
    """Prints the table, and says how many images are in it."""
    if lines:
        in_sets = len(lines[0]) == 2
        columns = ["set of classes"] if in_sets else ["label", "probability"] * (len(lines[0]) // 2)
        print(aligned([["image", *columns], *lines]))
    return f"{counted(len(lines), 'image')} {'is' if len(lines) == 1 else 'are'} classified."


def find_images(path: Path) -> list[Path]:
    """Returns the image files in a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    images, others = list_images(path)
    if not images:
        raise ValueError(f"there are no images in {path}")
    if others:
        print(f"Skipped in {path}: {skipped_files(others)}.", file=sys.stderr)
    return [Path(image) for image in images]


@torch.no_grad()
def classify(model, image_processor, images: dict[Path, Image.Image], top_k: int, answer=None) -> list[list[str]]:
    """Returns a line of the table for each image: its path, and `top_k` labels with their probabilities.

    Args:
        answer (`Callable`, *optional*):
            Returns the logits of images, in place of the model.
    """
    if answer is None:
        logits = model(**process_images(image_processor, list(images.values())).to(model.device)).logits
    else:
        logits = answer(list(images.values()))
    probabilities = logits.softmax(dim=-1)  # (B, C)
    id2label = model.config.id2label
    values, labels = probabilities.topk(min(top_k, len(id2label)))
    return [
        [str(path)] + [text for value, label in zip(*best) for text in (id2label[label], f"{value:.1%}")]
        for path, best in zip(images, zip(values.tolist(), labels.tolist()))
    ]


@torch.no_grad()
def classify_in_sets(
    conformal: ConformalClassifier, image_processor, images: dict[Path, Image.Image], coverage: float
) -> list[list[str]]:
    """Returns a line of the table for each image: its path, and the classes in its set with their probabilities."""
    inputs = process_images(image_processor, list(images.values())).to(conformal.classifier.device)
    sets = conformal.sets_of(conformal.model(**inputs).logits, coverage)
    lines = []
    for path, names, labels, probabilities in zip(images, sets.names, sets.labels, sets.probabilities):
        shown = ", ".join(f"{name} {probabilities[label]:.1%}" for name, label in zip(names, labels))
        lines.append([str(path), shown or "none: the model does not know"])
    return lines


if __name__ == "__main__":
    main()
