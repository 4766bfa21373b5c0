"""Readers for the `split_zhou_*.json` files of CoOp and for the folder layout of CLIP_benchmark."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from pathlib import PurePosixPath

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from ..file_contents import advice_for, foreign_content
from .columns import IMAGE, LABEL, find_image_column, read_labels


logger = logging.getLogger(__name__)

ZHOU_SPLITS = {"train": "train", "val": "validation", "test": "test"}
ZHOU_FORMAT = 'expected {"train": [[path, label, class name], ...], "val": [...], "test": [...]}'

CLASS_NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
LABEL_EXTENSION = "cls"  # of the label files in the shards of CLIP_benchmark


def load_zhou_split(split_file: str | os.PathLike, image_dir: str | os.PathLike) -> DatasetDict:
    """
    Reads a split published with CoOp: a JSON file with the path, label and class name of each image.

    The examples keep the order of the file, so that [`sample_few_shot`] draws the images that CoOp draws with the same
    seed. Images are opened only when they are read. The files are listed in DATASETS.md of
    https://github.com/KaiyangZhou/CoOp.

    Args:
        split_file (`str` or `os.PathLike`):
            A file of the form `{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`.
        image_dir (`str` or `os.PathLike`):
            The folder that the paths are relative to.

    Returns:
        `datasets.DatasetDict`: The splits `train`, `validation` and `test`, if present, with the columns `image` and
        `label`.

    Raises:
        ValueError: If the file is missing or malformed, if images are missing or outside of `image_dir`, or if labels
            and class names do not match.

    Example:

    ```py
    >>> splits = load_zhou_split("oxford_pets/split_zhou_OxfordPets.json", "oxford_pets/images")
    ```
    """
    split_file, image_dir = (os.path.expanduser(os.fspath(path)) for path in (split_file, image_dir))
    items = _read_zhou_file(split_file)
    features = Features({IMAGE: Image(), LABEL: ClassLabel(names=_zhou_class_names(split_file, items))})
    missing = [path for entries in items.values() for path, _, _ in entries if not _is_inside(image_dir, path)]
    if missing:
        raise ValueError(f"{len(missing)} images of {split_file!r} are not in {image_dir!r}, such as {missing[0]!r}.")
    splits = DatasetDict()
    for name, entries in items.items():
        images = [os.path.join(image_dir, path) for path, _, _ in entries]
        labels = [label for _, label, _ in entries]
        splits[ZHOU_SPLITS[name]] = Dataset.from_dict({IMAGE: images, LABEL: labels}, features=features)
    return splits


def _read_zhou_file(split_file: str) -> dict[str, list]:
    check_file(split_file)
    with open(split_file, encoding="utf-8-sig") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            what = foreign_content(split_file) or "download or write it again"
            raise ValueError(f"{split_file!r} is not a json file ({error}); {what}.") from error
    if not isinstance(content, dict) or "train" not in content:
        raise ValueError(f"{split_file!r} has no split 'train'; {ZHOU_FORMAT}.")
    items = {name: content[name] for name in ZHOU_SPLITS if name in content}
    for name, entries in items.items():
        for entry in entries:
            if not isinstance(entry, list) or list(map(type, entry)) != [str, int, str]:
                raise ValueError(f"{split_file!r} has the entry {entry!r} in {name!r}; {ZHOU_FORMAT}.")
    return items


def _zhou_class_names(split_file: str, items: dict[str, list]) -> list[str]:
    names: dict[int, str] = {}
    for path, label, name in (entry for entries in items.values() for entry in entries):
        if names.setdefault(label, name) != name:
            raise ValueError(f"{split_file!r} calls label {label} both {names[label]!r} and {name!r} ({path}).")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"The labels of {split_file!r} must count from 0 without gaps, got {sorted(names)[:10]}.")
    if len(set(names.values())) < len(names):
        raise ValueError(f"Two labels of {split_file!r} have the same class name.")
    return [names[label] for label in range(len(names))]


def _is_inside(image_dir: str, path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and os.path.isfile(os.path.join(image_dir, path))


def check_file(file: str) -> None:
    """Raises a `ValueError` if a file does not exist."""
    if os.path.isdir(file):
        raise ValueError(f"{file!r} is a folder and not a file; name the files in it, or give it as a folder.")
    if not os.path.isfile(file):
        raise ValueError(f"The file {file!r} does not exist.")


def check_folder(folder: str) -> None:
    """Raises a `ValueError` if a folder of images does not exist."""
    if os.path.isfile(folder):
        raise ValueError(f"{folder!r} is a file and not a folder of images.{advice_for(folder)}")
    if not os.path.isdir(folder):
        raise ValueError(f"The image folder {folder!r} does not exist.")


def load_clip_benchmark(folder: str | os.PathLike, **load_kwargs) -> DatasetDict:
    """
    Reads a classification dataset in the layout of CLIP_benchmark, such as `clip-benchmark/wds_*` on the Hub.

        folder/classnames.txt      one class name per line, in the order of the labels
        folder/train/0.tar, ...    images (webp, png or jpg) and their labels (cls)
        folder/test/0.tar, ...

    Download one with `hf download --repo-type dataset clip-benchmark/wds_vtab-pets --local-dir pets`.

    Args:
        folder (`str` or `os.PathLike`):
            The folder with the files above.
        load_kwargs (*optional*):
            Additional keyword arguments passed to `datasets.load_dataset`.

    Returns:
        `datasets.DatasetDict`: The splits in the folder, with the columns `image` and `label` (a `ClassLabel`).

    Raises:
        ValueError: If the class names, tar files, images or labels are missing, or if a label has no name.
    """
    folder = os.path.expanduser(os.fspath(folder))
    feature = ClassLabel(names=_read_class_names(folder))
    paths: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(str(folder)), "*", "*.tar"))):
        paths.setdefault(os.path.basename(os.path.dirname(path)), []).append(path)
    if not paths:
        raise ValueError(f"There are no tar files in the sub-folders of {str(folder)!r}.")
    for path in (path for of_split in paths.values() for path in of_split):
        what = foreign_content(path)
        if what is not None and "tar archive" not in what:
            raise ValueError(f"{path!r} is no tar file: {what}.")
    shards = {split: [glob.escape(path) for path in of_split] for split, of_split in paths.items()}
    splits = load_dataset("webdataset", data_files=shards, **load_kwargs)
    return DatasetDict({name: _with_class_names(name, split, feature) for name, split in splits.items()})


def read_clip_benchmark_templates(folder: str | os.PathLike) -> list[str]:
    """
    Reads the zero-shot templates of a dataset in the layout of CLIP_benchmark, for [`template_ensemble`].

    The placeholder `{c}` is replaced with `{}`.

    Raises:
        ValueError: If the folder has no templates.
    """
    return [template.replace("{c}", "{}") for template in _read_lines(folder, TEMPLATES_FILE)]


def _read_class_names(folder: str | os.PathLike) -> list[str]:
    names, counts = [], Counter()
    for name in _read_lines(folder, CLASS_NAMES_FILE):
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:  # ImageNet has two kinds of missile, and sunglasses twice
        logger.warning("Class names must be unique; %s are there more than once and are numbered.", repeated)
    return names


def _read_lines(folder: str | os.PathLike, file_name: str) -> list[str]:
    path = os.path.join(folder, file_name)
    if not os.path.isfile(path):
        raise ValueError(f"There is no {file_name} in {str(folder)!r}, so it is not in the layout of CLIP_benchmark.")
    with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a mark
        return [line.strip() for line in file if line.strip()]


def _with_class_names(name: str, split: Dataset, feature: ClassLabel) -> Dataset:
    if LABEL_EXTENSION not in split.column_names:
        raise ValueError(
            f"The split {name!r} has no labels ({LABEL_EXTENSION!r}); its files are {', '.join(split.column_names)}. "
            "Expected one label per image; captions are not supported."
        )
    columns = {find_image_column(split.features): IMAGE, LABEL_EXTENSION: LABEL}
    labels = read_labels(split, LABEL_EXTENSION)
    unnamed = [label for label in labels if not 0 <= label < feature.num_classes]
    if unnamed:
        raise ValueError(
            f"The split {name!r} has label {unnamed[0]}, but {CLASS_NAMES_FILE} has {len(feature.names)} names."
        )
    return split.select_columns(list(columns)).rename_columns(columns).cast_column(LABEL, feature)
