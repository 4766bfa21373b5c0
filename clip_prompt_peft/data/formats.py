"""The splits that the few-shot literature of CLIP shares: `split_zhou_*.json` of CoOp."""

from __future__ import annotations

import glob
import json
import logging
import os
from pathlib import PurePosixPath

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from .columns import IMAGE, LABEL, find_image_column, read_labels


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


logger = logging.getLogger(__name__)


WDS_LABEL = "cls"


CLASS_NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"


def load_clip_benchmark(folder: str | os.PathLike, **load_kwargs) -> DatasetDict:
    """Reads a classification data set in the layout of CLIP_benchmark, such as `clip-benchmark/wds_*` of the Hub.

        folder/classnames.txt      a class name on each line, in the order of the labels
        folder/train/0.tar, ...    images (webp, png or jpg) and their labels (cls)
        folder/test/0.tar, ...

    Download one with `hf download --repo-type dataset clip-benchmark/wds_vtab-pets --local-dir pets`.

    Args:
        folder: with the files above.
        load_kwargs: for `datasets.load_dataset`.

    Returns:
        The splits that are there, with the columns `image` and `label` (a `ClassLabel`).

    Raises:
        ValueError: no such folder, class names or tar files; no images or labels in them; a label without a name.
    """
    names = _class_names(folder)
    shards = {split: [glob.escape(path) for path in paths] for split, paths in _shards(folder).items()}
    splits = load_dataset("webdataset", data_files=shards, **load_kwargs)
    feature = ClassLabel(names=names)
    return DatasetDict({name: _standard(name, split, feature) for name, split in splits.items()})


def read_clip_benchmark_templates(folder: str | os.PathLike) -> list[str]:
    """The zero-shot templates of the data set, for [`template_ensemble`]; `{c}` becomes `{}`.

    Raises:
        ValueError: there are none.
    """
    return [template.replace("{c}", "{}") for template in _lines(folder, TEMPLATES_FILE)]


def _class_names(folder) -> list[str]:
    names, seen = [], {}
    for name in _lines(folder, CLASS_NAMES_FILE):
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    repeated = [name for name, count in seen.items() if count > 1]
    if repeated:  # ImageNet has two kinds of missile, and sunglasses twice
        logger.warning(
            "Class names must differ from each other; %s are there more than once and get numbers.", repeated
        )
    return names


def _lines(folder, file_name: str) -> list[str]:
    path = os.path.join(folder, file_name)
    if not os.path.isfile(path):
        raise ValueError(f"There is no {file_name} in {str(folder)!r}, so it is not in the layout of CLIP_benchmark.")
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def _shards(folder) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(str(folder)), "*", "*.tar"))):
        shards.setdefault(os.path.basename(os.path.dirname(path)), []).append(path)
    if not shards:
        raise ValueError(f"There are no tar files in the sub-folders of {str(folder)!r}.")
    return shards


def _standard(name: str, split, feature: ClassLabel):
    if WDS_LABEL not in split.column_names:
        raise ValueError(
            f"The split {name!r} has no labels ({WDS_LABEL!r}); its files are {', '.join(split.column_names)}. Sets "
            "of captions, or with several labels per image, are not read."
        )
    columns = {find_image_column(split.features): IMAGE, WDS_LABEL: LABEL}
    labels = read_labels(split, WDS_LABEL)
    nameless = [label for label in labels if not 0 <= label < feature.num_classes]
    if nameless:
        raise ValueError(
            f"The split {name!r} has the label {nameless[0]}, but {CLASS_NAMES_FILE} has {feature.num_classes} names."
        )
    return split.select_columns(list(columns)).rename_columns(columns).cast_column(LABEL, feature)
