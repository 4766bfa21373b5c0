"""One form for all image data sets: columns `image` and `label`, the same class names in every split."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping

from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .columns import IMAGE, LABEL, find_image_column, find_label_column, read_labels
from .formats import load_clip_benchmark, load_zhou_split


logger = logging.getLogger(__name__)


def standardize(splits: DatasetDict, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Renames the image and the label column, drops the others, and gives all splits the same class names.

    Args:
        splits: `train` and any others.
        image_column, label_column: by default found, see [`find_image_column`] and [`find_label_column`].

    Returns:
        The splits, with the columns `image` and `label` (a `ClassLabel`). A split without labels is left out.

    Raises:
        ValueError: no training split; columns that cannot be found; labels in a split that `train` does not have.
    """
    if "train" not in splits:
        raise ValueError(f"The data set has no split 'train'; its splits are {', '.join(splits)}.")
    features = splits["train"].features
    columns = {
        find_image_column(features, image_column): IMAGE,
        find_label_column(features, label_column): LABEL,
    }
    label_feature = _label_feature(splits["train"], next(key for key, new in columns.items() if new == LABEL))
    standard = {}
    for name, split in splits.items():
        _check_same_columns(name, split, columns)
        split = split.select_columns(list(columns)).rename_columns(columns)
        if not isinstance(split.features[IMAGE], Image):
            split = split.cast_column(IMAGE, Image())
        if name != "train" and _is_unlabelled(split):
            logger.warning("The split %r has no labels and is left out.", name)
            continue
        standard[name] = _with_labels(name, split, label_feature)
    _check_train_covers(standard)
    return DatasetDict(standard)


def _check_same_columns(name: str, split: Dataset, columns: Mapping[str, str]) -> None:
    missing = [column for column in columns if column not in split.column_names]
    if missing:
        raise ValueError(
            f"The split {name!r} has no column {missing[0]!r}, which 'train' has; its columns are "
            f"{', '.join(split.column_names)}."
        )


def _label_feature(train: Dataset, column: str) -> ClassLabel:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return feature
    return ClassLabel(names=sorted({label for label in read_labels(train, column) if label is not None}))


def _is_unlabelled(split: Dataset) -> bool:
    return all(label is None or label == -1 for label in read_labels(split, LABEL))


def _with_labels(name: str, split: Dataset, feature: ClassLabel) -> Dataset:
    own = split.features[LABEL]
    labels = read_labels(split, LABEL)
    if isinstance(own, ClassLabel):
        if own.names != feature.names:
            raise ValueError(
                f"The split {name!r} has the classes {own.names[:5]}..., but 'train' has {feature.names[:5]}...; they "
                "must be the same, in the same order."
            )
        strange = [label for label in labels if label is None or label < 0]
    else:
        known = set(feature.names)
        strange = [label for label in labels if label not in known]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(labels)} examples of the split {name!r} have a label that is no class of "
            f"'train', such as {strange[0]!r}."
        )
    return split if isinstance(own, ClassLabel) else split.cast_column(LABEL, feature)


def _check_train_covers(splits: Mapping[str, Dataset]) -> None:
    names = splits["train"].features[LABEL].names
    trained = set(read_labels(splits["train"], LABEL))
    for split, dataset in splits.items():
        untrained = sorted(set(read_labels(dataset, LABEL)) - trained)
        if untrained:
            raise ValueError(
                f"The split {split!r} has images of {len(untrained)} classes that have none in 'train': "
                f"{', '.join(names[label] for label in untrained[:10])}."
            )


FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    folders: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    zhou_split: str | None = None,
    image_dir: str | None = None,
    webdataset_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **load_kwargs,
) -> DatasetDict:
    """
    Reads a data set of the Hub, folders of images, files of rows, a published split, or tar files.

    Args:
        dataset_name: Hub id, or a folder that `datasets.load_dataset` understands.
        dataset_config_name: its configuration.
        folders: split name to folder, with one sub-folder of images per class: `{"train": "pets/train"}`.
        files: split name to parquet or arrow file.
        zhou_split, image_dir: a published split and the folder of its images, see [`load_zhou_split`].
        webdataset_dir: a folder in the layout of CLIP_benchmark, see [`load_clip_benchmark`].
        image_column, label_column: by default found, see [`find_image_column`] and [`find_label_column`].
        load_kwargs: for `datasets.load_dataset` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        The splits, with the columns `image` and `label` (a `ClassLabel`). A split without labels is left out.

    Raises:
        ValueError: none or several sources; a missing or empty folder or file; columns that cannot be found; no
            training split, or labels in another split that it does not have.
    """
    if sum(bool(source) for source in (dataset_name, folders, files, zhou_split, webdataset_dir)) != 1:
        raise ValueError("Give exactly one of dataset_name, folders, files, zhou_split and webdataset_dir.")
    if bool(zhou_split) != bool(image_dir):
        raise ValueError("zhou_split and image_dir go together: the paths in the file are relative to the folder.")
    if folders:
        splits = _load_folders(folders, load_kwargs)
    elif files:
        splits = _load_files(files, load_kwargs)
    elif zhou_split:
        splits = load_zhou_split(zhou_split, image_dir)
    elif webdataset_dir:
        splits = load_clip_benchmark(webdataset_dir, **load_kwargs)
    else:
        splits = load_dataset(dataset_name, dataset_config_name, **load_kwargs)
    return standardize(splits, image_column, label_column)


def _load_folders(folders: Mapping[str, str], load_kwargs: dict) -> DatasetDict:
    for folder in folders.values():
        _check_folder(folder)
    data_files = {split: os.path.join(glob.escape(folder), "**") for split, folder in folders.items()}
    splits = load_dataset("imagefolder", data_files=data_files, **load_kwargs)
    if LABEL not in next(iter(splits.values())).column_names:
        raise ValueError(
            f"No classes were found in {', '.join(folders.values())}. Needed is one sub-folder for each of at least "
            "two classes, with the images right inside: FOLDER/cat/1.jpg, FOLDER/dog/1.jpg, ..."
        )
    return splits


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise ValueError(f"The image folder {folder!r} does not exist.")
    names = (name for _, _, files in os.walk(folder) for name in files)
    if not any(os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS for name in names):
        raise ValueError(f"There are no images in {folder!r}, nor in its sub-folders.")


def _load_files(files: Mapping[str, str], load_kwargs: dict) -> DatasetDict:
    missing = [file for file in files.values() if not os.path.isfile(file)]
    if missing:
        raise ValueError(f"The file {missing[0]!r} does not exist.")
    endings = {os.path.splitext(file)[1].lower() for file in files.values()}
    if len(endings) > 1 or not endings <= set(FILE_FORMATS):
        raise ValueError(
            f"The files must all be of one format, {' or '.join(FILE_FORMATS)}; got {', '.join(files.values())}."
        )
    builder = FILE_FORMATS[endings.pop()]
    # one by one: together, `datasets` would read all files with the class names of the first
    return DatasetDict(
        {
            split: load_dataset(builder, data_files={split: file}, split=split, **load_kwargs)
            for split, file in files.items()
        }
    )
