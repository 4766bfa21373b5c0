"""Folders of images with one sub-folder for each class."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from ..file_contents import advice_for
from ..image_files import SYSTEM_FOLDERS, list_images, skipped_files
from .columns import IMAGE, LABEL, check_names_differ
from .splits import SPLIT_OF, how_to_name_splits, split_of, splits_among


logger = logging.getLogger(__name__)

LAYOUT = (
    "Expected at least two classes, each with a sub-folder that holds its images directly: FOLDER/cat/1.jpg, "
    "FOLDER/dog/1.jpg, ..."
)


TABLE_NAMES = "metadata.csv, metadata.jsonl or metadata.parquet"


def load_class_folders(folders: Mapping[str, str], cache_dir: str | None = None) -> DatasetDict:
    """
    Reads splits in which the class of an image is the name of the folder that holds it.

    Symbolic links are followed. Class names are in Unicode's composed form (NFC), so that folders that were made on a
    Mac have the classes of those that were not. Files that are skipped are named in a warning.

    Args:
        folders (`Mapping[str, str]`):
            The folder of each split.
        cache_dir (`str`, *optional*):
            The cache folder of `datasets`.

    Returns:
        `datasets.DatasetDict`: The splits with the columns `image` and `label`, in the order of the paths.

    Raises:
        ValueError: If a class folder has no images, or if images are not where the layout has them.
    """
    found = {split: _find_images(folder) for split, folder in folders.items()}
    names = {split: {name for _, name in images} for split, images in found.items()}
    all_names = sorted(set().union(*names.values()))
    if len(all_names) < 2:
        raise ValueError(f"No classes were found in {', '.join(folders.values())}. {LAYOUT}")
    check_names_differ(all_names)
    for split, of_split in names.items():
        missing = sorted(names.get("train", of_split) - of_split)
        if missing:
            logger.warning("The split %r has no images of %d classes: %s", split, len(missing), missing[:10])
    features = Features({IMAGE: Image(), LABEL: ClassLabel(names=all_names)})
    splits = DatasetDict()
    for split, images in found.items():
        # The time of the last change is an argument so that embeddings of changed images are computed again.
        files = [(path, name, os.stat(path).st_mtime_ns) for path, name in images]
        splits[split] = Dataset.from_generator(
            _examples, features=features, gen_kwargs={"files": files}, cache_dir=cache_dir, split=split
        )
    return splits


def _examples(files: list[tuple[str, str, int]]) -> Iterator[dict]:
    for path, name, _ in files:
        yield {IMAGE: path, LABEL: name}


def _find_images(folder: str) -> list[tuple[str, str]]:
    """Returns the path and the class name of each image in a folder."""
    images, others = list_images(folder)
    if not images:
        details = f" Skipped: {skipped_files(others)}." if others else ""
        advice = advice_for(others[0]) if others else ""
        raise ValueError(f"There are no images in {folder!r} or its sub-folders.{details}{advice}")
    parts = {path: os.path.relpath(path, folder).split(os.sep) for path in images}
    _check_depths(folder, parts, others)
    _check_class_folders(folder, {path[0] for path in parts.values()}, others)
    if others:
        logger.warning("Skipped in %r: %s.", folder, skipped_files(others))
    spellings: dict[str, str] = {}
    for path in images:
        parent = parts[path][-2]
        name = unicodedata.normalize("NFC", parent)
        if spellings.setdefault(name, parent) != parent:
            raise ValueError(
                f"{folder!r} has two folders {name!r} that differ only in how their accents are stored (NFC and NFD). "
                "Move the images into one of them."
            )
    return [(path, unicodedata.normalize("NFC", parts[path][-2])) for path in images]


def _check_depths(folder: str, parts: Mapping[str, list[str]], others: list[str]) -> None:
    """Raises a `ValueError` if images are at the top, at different depths, or in folders of splits."""
    if splits := splits_among(parts.values()):
        raise ValueError(how_to_name_splits(folder, splits, {names[0] for names in parts.values()} - set(splits)))
    depths: dict[int, str] = {}
    for path, names in parts.items():
        depths.setdefault(len(names), path)
    if len(depths) > 1 or 1 in depths:
        places = " and ".join(repr(path) for _, path in sorted(depths.items()))
        raise ValueError(
            f"No classes were found in {folder}: images lie at the top or at different depths, such as {places}. Move "
            f"or remove what is not in a class folder. {LAYOUT} Or a table {TABLE_NAMES} that lists the images"
            f"{f', beside them; there are {skipped_files(others)}' if others else ''}."
        )
    if 2 in depths:
        return
    top = sorted({names[0] for names in parts.values()})
    if {name.lower() for name in top} <= set(SPLIT_OF):
        raise ValueError(how_to_name_splits(folder, {name: SPLIT_OF[name.lower()] for name in top}))
    repeated = _repeated_classes(parts.values())
    if repeated:
        name, (first, second, *_) = next(iter(repeated.items()))
        logger.warning(
            "Folders in %r hold the same classes, such as %r and %r the class %r (%d classes of %d folders): their "
            "images are read together. If they are splits, name them: folders={'train': %r, 'test': %r}, or "
            "--train_dir, --test_dir.",
            folder,
            first,
            second,
            name,
            len(repeated),
            len(top),
            os.path.join(folder, first),
            os.path.join(folder, second),
        )
        return
    logger.warning(
        "The images in %r lie deeper than its sub-folders, such as %r. Their class is the folder that holds them.",
        folder,
        depths.popitem()[1],
    )


def _repeated_classes(images: Iterable[list[str]]) -> dict[str, list[str]]:
    """Returns the classes that are in several folders at the top, with these folders."""
    folders: dict[str, set[str]] = {}
    for names in images:
        folders.setdefault(names[-2], set()).add(names[0])
    return {
        name: sorted(of_class, key=lambda top: (split_of(top) != "train", top))  # that to train on goes first
        for name, of_class in sorted(folders.items())
        if len(of_class) > 1
    }


def _check_class_folders(folder: str, with_images: set[str], others: list[str]) -> None:
    """Raises a `ValueError` if a sub-folder has no images."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    empty = sorted(set(names) - with_images - SYSTEM_FOLDERS)
    if empty:
        files = [path for path in others if os.path.relpath(path, folder).split(os.sep)[0] in empty]
        holds = f" They hold {skipped_files(files)}." if files else " They are empty."
        raise ValueError(
            f"{len(empty)} class folders of {folder!r} have no images of a known ending: {', '.join(empty[:10])}."
            f"{holds} Convert their files, add images, or remove the folders."
        )
