"""The splits that the few-shot literature of CLIP shares: `split_zhou_*.json` of CoOp."""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from .standardize import IMAGE, LABEL


SPLITS = {"train": "train", "val": "validation", "test": "test"}


def load_zhou_split(split_file: str | os.PathLike, image_dir: str | os.PathLike) -> DatasetDict:
    """Reads a published split: a json file that names, for `train`, `val` and `test`, image, label and class of each.

    The examples keep the order of the file, on which the few-shot draw depends: with the same seed, `sample_few_shot`
    draws the images that CoOp draws (https://github.com/KaiyangZhou/CoOp, DATASETS.md has the files). Images are
    opened when they are read.

    Args:
        split_file: `{"train": [[path, label, class name], ...], "val": ..., "test": ...}`.
        image_dir: the folder that the paths are relative to.

    Returns:
        The splits `train`, `validation` and `test`, as far as they are there, with the columns `image` and `label`.

    Raises:
        ValueError: the file is missing or of another form, images are missing or outside of `image_dir`, or labels
            and class names do not go together.

    Example:

    ```py
    >>> splits = load_zhou_split("oxford_pets/split_zhou_OxfordPets.json", "oxford_pets/images")
    ```
    """
    items = _read(split_file)
    feature = ClassLabel(names=_class_names(split_file, items))
    missing = [path for entries in items.values() for path, _, _ in entries if not _is_there(image_dir, path)]
    if missing:
        raise ValueError(
            f"{len(missing)} images of {str(split_file)!r} are not in the folder {str(image_dir)!r}, such as "
            f"{missing[0]!r}."
        )
    features = Features({IMAGE: Image(), LABEL: feature})
    return DatasetDict(
        {
            SPLITS[name]: Dataset.from_dict(
                {
                    IMAGE: [os.path.join(image_dir, path) for path, _, _ in entries],
                    LABEL: [label for _, label, _ in entries],
                },
                features=features,
            )
            for name, entries in items.items()
        }
    )


def _read(split_file) -> dict[str, list]:
    if not os.path.isfile(split_file):
        raise ValueError(f"The file {str(split_file)!r} does not exist.")
    with open(split_file, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{str(split_file)!r} is not a json file ({error}).") from error
    form = 'needed is {"train": [[path, label, class name], ...], "val": [...], "test": [...]}'
    if not isinstance(content, dict) or "train" not in content:
        raise ValueError(f"{str(split_file)!r} holds no split 'train'; {form}.")
    items = {name: content[name] for name in SPLITS if name in content}
    for name, entries in items.items():
        for entry in entries:
            if not isinstance(entry, list) or list(map(type, entry)) != [str, int, str]:
                raise ValueError(f"{str(split_file)!r} has the entry {entry!r} in {name!r}; {form}.")
    return items


def _class_names(split_file, items) -> list[str]:
    names: dict[int, str] = {}
    for entries in items.values():
        for path, label, name in entries:
            if names.setdefault(label, name) != name:
                raise ValueError(
                    f"{str(split_file)!r} calls label {label} both {names[label]!r} and {name!r} ({path})."
                )
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"The labels of {str(split_file)!r} must count from 0 without gaps, got {sorted(names)[:10]}."
        )
    if len(set(names.values())) < len(names):
        raise ValueError(f"Two labels of {str(split_file)!r} have the same class name.")
    return [names[label] for label in range(len(names))]


def _is_there(image_dir, path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and os.path.isfile(os.path.join(image_dir, path))
