"""One form for all image data sets: columns `image` and `label`, the same class names in every split."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from datasets import ClassLabel, Dataset, DatasetDict, Image

from .columns import find_image_column, find_label_column
from .few_shot import read_labels


logger = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"


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
