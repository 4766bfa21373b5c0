"""One form for the splits of any source: columns `image` and `label`, and the class names of `train` for all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value

from ..templates import warn_of_names_without_words
from .columns import (
    IMAGE,
    LABEL,
    as_image_column,
    check_names_differ,
    clean_class_name,
    find_image_column,
    find_label_column,
    is_text,
    plain_name,
    read_labels,
    type_name,
    unlabeled_rows,
)
from .reading import check_rows


logger = logging.getLogger(__name__)


def standardize(splits: DatasetDict, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """
    Renames the image and label columns, drops all others, and gives all splits the class names of `train`.

    Args:
        splits (`datasets.DatasetDict`):
            The split `train` and any others.
        image_column, label_column (`str`, *optional*):
            The names of the columns. By default, they are determined from the column types, see [`find_image_column`]
            and [`find_label_column`].

    Returns:
        `datasets.DatasetDict`: The splits with the columns `image` and `label` (a `ClassLabel`), except those without
        labels.

    Raises:
        ValueError: If a column cannot be determined, or if `train` is missing or lacks a class of another split.
    """
    if "train" not in splits:
        raise ValueError(f"The dataset has no split 'train'; its splits are {', '.join(splits)}.")
    train = splits["train"]
    if isinstance(train, IterableDataset):
        return _standardize_streams(splits, image_column, label_column)
    image_column, label_column = _find_columns(train.features, image_column, label_column)
    labels = read_labels(train, label_column)
    trained = set(labels)
    label_feature = train.features[label_column]
    if not isinstance(label_feature, ClassLabel):
        _check_named(labels)
        label_feature = ClassLabel(names=sorted(trained - {None}))
        _check_names(label_feature.names)
    _warn_of_names(label_feature.names)

    standard = DatasetDict()
    for name, split in splits.items():
        split = _select_columns(name, split, {image_column: IMAGE, label_column: LABEL})
        labels = read_labels(split, LABEL)
        if name != "train" and all(label is None or label == -1 for label in labels):
            logger.warning("The split %r has no labels and is left out.", name)
            continue
        is_named = isinstance(train.features[label_column], ClassLabel) and is_text(split.features[LABEL])
        seen = {label_feature.names[label] for label in trained} if is_named else trained
        _check_labels(name, split, labels, label_feature, seen)
        if not isinstance(split.features[LABEL], ClassLabel):
            split = split.cast_column(LABEL, label_feature)
        standard[name] = split
    _warn_of_few_classes(label_feature, set(read_labels(standard["train"], LABEL)))
    return standard


def _find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    if image_column is None or image_column != label_column:
        image_column = find_image_column(features, image_column)
    if image_column != label_column:
        label_column = find_label_column(features, label_column)
    if image_column == label_column:
        raise ValueError(f"The column {image_column!r} cannot be the image column and the label column; name another.")
    return image_column, label_column


def _check_named(labels: list) -> None:
    """Raises a `ValueError` if class names of 'train' hold nothing but spaces."""
    blank = [row for row, name in enumerate(labels) if name is not None and not clean_class_name(name)]
    if blank:
        raise ValueError(
            f"{len(blank)} of the {len(labels)} rows of the split 'train' have an empty class name, "
            f"{labels[blank[0]]!r}, such as row {blank[0]}; name their class, or leave these rows out of the data."
        )


def _check_names(names: list[str]) -> None:
    """Checks class names that come from a column of text, as the names of class folders are checked."""
    check_names_differ(names)
    several = [name for name in names if re.search(r"[|;]|^\[.*\]$", name)]
    if several:
        logger.warning(
            "%d class names look like several labels, such as %r. Each is taken for the name of one class, since a "
            "classifier gives one class to an image.",
            len(several),
            several[0],
        )
    if "-1" in names:
        logger.warning("'-1' is taken for the name of a class; if it stands for no label, leave these rows out.")


def _warn_of_names(names: list[str]) -> None:
    warn_of_names_without_words([clean_class_name(name) for name in names if name != "-1"])


def _warn_of_few_classes(feature: ClassLabel, trained: set) -> None:
    if len(trained) == 1:
        logger.warning(
            "All images of 'train' are of one class, %r: a classifier that is trained on them alone predicts nothing "
            "else.",
            feature.names[next(iter(trained))],
        )
    unused = [name for label, name in enumerate(feature.names) if label not in trained]
    if unused:
        logger.warning(
            "Classes without images in 'train' (%d of %d): %s. They are predicted by their names alone.",
            len(unused),
            feature.num_classes,
            unused[:10],
        )


def _standardize_streams(
    splits: IterableDatasetDict, image_column: str | None, label_column: str | None
) -> IterableDatasetDict:
    """Does what can be done without reading the labels."""
    features = splits["train"].features
    if features is None:
        raise ValueError(
            "The columns of this stream have no types, so its image and label columns are unknown; cast it to "
            "Features with an Image and a ClassLabel, or load it without streaming=True."
        )
    image_column, label_column = _find_columns(features, image_column, label_column)
    feature = features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} of this stream holds {type_name(feature)}, whose class names are only known "
            "after reading all of it; load it without streaming=True."
        )
    if feature.num_classes == 1:
        logger.warning("The stream has one class only, %r; a classifier needs two.", feature.names[0])
    _warn_of_names(feature.names)
    standard = IterableDatasetDict()
    for name, split in splits.items():
        if split.features.get(label_column) != features[label_column]:
            raise ValueError(f"The stream {name!r} has other classes than 'train'; they must be the same, in order.")
        chosen = {image_column: IMAGE, label_column: LABEL}
        split = split.select_columns(list(chosen)).rename_columns(
            {old: new for old, new in chosen.items() if old != new}
        )
        is_typed = isinstance(split.features[IMAGE], Image)  # perhaps with a mode
        standard[name] = split if is_typed else split.cast_column(IMAGE, Image())
    return standard


def _select_columns(name: str, split: Dataset, new_names: dict[str, str]) -> Dataset:
    missing = [column for column in new_names if column not in split.column_names]
    if missing:
        raise ValueError(
            f"Split {name!r} has no column {missing[0]!r}; its columns are {', '.join(split.column_names)}."
        )
    split = split.select_columns(list(new_names)).rename_columns(new_names)
    if is_text(split.features[LABEL]):
        split = split.cast_column(LABEL, Value("string"))
    split = as_image_column(split)
    check_rows(split)
    return split


def _check_labels(name: str, split: Dataset, labels: list, expected: ClassLabel, trained: set) -> None:
    feature, known = split.features[LABEL], set(expected.names)
    if isinstance(feature, ClassLabel):
        if feature.names != expected.names:
            raise ValueError(
                f"The split {name!r} has the classes {feature.names[:5]}..., but 'train' has {expected.names[:5]}...; "
                "they must be the same, in the same order."
            )
        known = set(range(expected.num_classes))
    missing = unlabeled_rows(labels, feature)
    if missing:
        marked = {labels[row] for row in missing} - {None}
        mark = f" (they are marked by {', '.join(map(str, sorted(marked)))})" if marked else ""
        raise ValueError(
            f"{len(missing)} of the {len(labels)} rows of the split {name!r} have no label{mark}, such as row "
            f"{', '.join(map(str, missing[:5]))}; leave these rows out of the data."
        )
    unknown = [row for row, label in enumerate(labels) if label not in known]
    if unknown:
        first = labels[unknown[0]]
        raise ValueError(
            f"The split {name!r} has {len(unknown)} labels that are no class of 'train', such as {first!r} in row "
            f"{unknown[0]}.{_hint([first], expected.names)}"
        )
    untrained = sorted(set(labels) - trained)
    if untrained:
        names = [expected.names[label] if isinstance(label, int) else label for label in untrained]
        have = {expected.names[label] if isinstance(label, int) else label for label in trained}
        raise ValueError(
            f"The split {name!r} has images of classes that have none in 'train' ({len(untrained)}): "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}.{_hint(names, have)}"
        )


def _hint(names: Iterable, others: Iterable[str]) -> str:
    """Names those of the other classes that are meant, if they are only spelled otherwise."""
    wanted = {plain_name(name) for name in names if isinstance(name, str)}
    alike = [repr(other) for other in sorted(others) if plain_name(other) in wanted]
    spelled = "which differ in case or spaces only, or in how accents are stored; rename one"
    return f" It has {', '.join(alike)}, {spelled}." if alike else ""
