"""Data sets in the layout of CLIP_benchmark: tar files with class names and templates beside them."""

from __future__ import annotations

import glob
import logging
import os

from datasets import ClassLabel, DatasetDict, load_dataset

from .columns import find_image_column
from .few_shot import read_labels
from .standardize import IMAGE, LABEL


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
