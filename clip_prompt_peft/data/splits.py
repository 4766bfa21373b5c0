"""Splits that the names of folders, or a column of a table, tell apart."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ..image_files import list_images
from .columns import USUAL_LABEL_NAMES, is_text


logger = logging.getLogger(__name__)

SPLIT_OF = {  # word to split, as `datasets` has it
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SEPARATORS = re.compile("[-._ 0-9]+")  # between the words of a name, as `datasets` has them
# Columns that are named in a warning if their values are no names of splits.
SPLIT_COLUMNS = (
    *("split", "splits", "subset", "partition", "set", "usage", "phase", "fold", "folds", "kfold", "is_train"),
    *("is_training", "is_training_image", "is_valid", "is_val", "is_validation", "is_test"),
)
MAX_NAMES = 20  # of splits, also if they are spelled in several ways
MAX_SHOWN = 5


def split_of(name: str) -> str | None:
    """Returns the split that a folder is of, such as `"train"` for `seg_train`, or `None`."""
    splits = {SPLIT_OF[word] for word in SEPARATORS.split(name.lower()) if word in SPLIT_OF}
    return splits.pop() if len(splits) == 1 else None


def split_folders(folder: str) -> dict[str, str]:
    """
    Returns the folders of the splits in a folder, or the folder itself as `train`.

    Raises:
        ValueError: If two folders are of one split, or if some are of splits and others are not.
    """
    images = [os.path.relpath(path, folder).split(os.sep) for path in list_images(folder)[0]]
    top = sorted({parts[0] for parts in images})
    if top and {name.lower() for name in top} <= set(SPLIT_OF):
        return _one_folder_each(folder, {name: SPLIT_OF[name.lower()] for name in top})
    splits = splits_among(images)
    if not splits:
        return {"train": folder}
    if set(splits) == set(top):
        found = _one_folder_each(folder, splits)
        logger.warning("%r is read as splits: %s.", folder, ", ".join(f"{found[name]!r} is {name}" for name in found))
        return found
    raise ValueError(how_to_name_splits(folder, splits, sorted(set(top) - set(splits))))


def splits_among(images: Collection[list[str]]) -> dict[str, str]:
    """Returns which folders at the top are splits, by name: they hold folders of classes, and one is to train on.

    Args:
        images (`Collection[list[str]]`):
            The parts of the path of each image. Two parts are a class called `test tube` and its image.
    """
    flat = {parts[0] for parts in images if len(parts) < 3}
    splits = {name: split for name in {parts[0] for parts in images} - flat if (split := split_of(name))}
    return dict(sorted(splits.items())) if "train" in splits.values() and len(set(splits.values())) > 1 else {}


def how_to_name_splits(folder: str, splits: dict[str, str], others: Collection[str] = ()) -> str:
    """Returns an error message about a folder that holds the folders of splits."""
    order = list(dict.fromkeys(SPLIT_OF.values()))
    named = {
        splits[name]: os.path.join(folder, name) for name in sorted(splits, key=lambda one: order.index(splits[one]))
    }
    flags = " ".join(f"--{split}_dir {path!r}" for split, path in named.items())
    beside = f" beside {', '.join(sorted(others)[:MAX_SHOWN])}," if others else ""
    return (
        f"{folder!r} holds the folders of splits, {', '.join(sorted(splits))},{beside} and not of classes. Name the "
        f"folder of each split: folders={named!r}, or {flags}."
    )


def _one_folder_each(folder: str, splits: dict[str, str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for name, split in splits.items():
        if split in folders:
            raise ValueError(
                f"{folder!r} has two folders for the split {split!r}, {os.path.basename(folders[split])} and {name}. "
                "Name the one to use: folders={...}, or --train_dir, --validation_dir, --test_dir."
            )
        folders[split] = os.path.join(folder, name)
    return folders


def split_by_column(splits: DatasetDict, other_columns: Collection[str | None]) -> DatasetDict:
    """
    Divides images that are all in `train` by a column whose values are the names of splits, `train` among them.

    A warning tells it. A column that is called `split`, `fold` or so and has other values is named in a warning that
    says how to use it.

    Args:
        splits (`DatasetDict`):
            The data, with all its columns.
        other_columns (`Collection[str]`):
            The columns that are known to hold images or labels.
    """
    features = splits["train"].features if "train" in splits else None
    is_alone = set(splits) == {"train"}
    for column in features or ():
        is_called_so = column.lower() in SPLIT_COLUMNS
        if column in other_columns or column in USUAL_LABEL_NAMES or not _may_divide(features, column, is_called_so):
            continue
        if not all(isinstance(split, Dataset) for split in splits.values()):
            if is_called_so:
                logger.warning("The column %r of a stream is not used; %s", column, _ADVICE)
        elif not is_alone and is_called_so:
            _compare_splits(splits, column)
        elif is_alone and (divided := _divide(splits["train"], column, is_called_so)):
            return divided
    return splits


_ADVICE = (
    "to train on a part of the images only, give each split a file (--train_file, --test_file) or a folder "
    "(--train_dir, --test_dir) of its own."
)


def _may_divide(features: Features, column: str, is_called_so: bool) -> bool:
    feature = features[column]
    is_number = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool"))
    return is_text(feature) or isinstance(feature, ClassLabel) or (is_number and is_called_so)


def _values(dataset: Dataset, column: str) -> list[str | None]:
    feature = dataset.features[column]
    values = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    return [None if value is None else str(value).strip() for value in values]


def _divide(train: Dataset, column: str, is_called_so: bool) -> DatasetDict | None:
    """Returns the splits that a column names, or `None`; with a warning if it is called so, but names others."""
    arrow = train.select_columns(column).with_format("arrow")[:][column]
    if not is_called_so and len(arrow.unique()) > MAX_NAMES:
        return None
    values = _values(train, column)
    rows: dict[str | None, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(SPLIT_OF.get((value or "").lower()), []).append(row)
    if set(rows) == {"train"}:
        return None
    if None in rows or "train" not in rows:
        if is_called_so:
            _warn_of_unused(column, values)
        return None
    counts = ", ".join(f"{split} ({len(of_split)})" for split, of_split in rows.items())
    logger.warning("The column %r divides the images: %s.", column, counts)
    without = train.remove_columns(column)
    return DatasetDict({split: without.select(of_split) for split, of_split in rows.items() if split is not None})


def _warn_of_unused(column: str, values: list[str | None]) -> None:
    shown = ", ".join(repr(value) for value in list(dict.fromkeys(values))[:MAX_SHOWN])
    logger.warning(
        "The column %r is not used. It holds %s, and only the names train, validation and test, in all rows, divide "
        "the images by themselves. Put them there, or %s",
        column,
        shown,
        _ADVICE,
    )


def _compare_splits(splits: DatasetDict, column: str) -> None:
    """Warns if a column says that an image of one split is of another one."""
    for name, split in splits.items():
        if column not in split.column_names or not _may_divide(split.features, column, True):
            continue
        named = [SPLIT_OF.get((value or "").lower()) for value in _values(split, column)]
        others = [other for other in named if other not in (None, SPLIT_OF.get(name.lower(), name))]
        if others:
            logger.warning(
                "The column %r says that %d of the %d images of %r are of the split %r. It is not used, since the "
                "splits are given. Leave these rows out, if they are not meant.",
                column,
                len(others),
                len(named),
                name,
                others[0],
            )
