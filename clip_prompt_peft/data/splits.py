"""Dividing a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datasets import ClassLabel, Dataset

from .few_shot import read_labels
from .standardize import LABEL


def hold_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits off `fraction` of the examples, of every class alike, for evaluation.

    Returns:
        What is left to train on, and what was held out.

    Raises:
        ValueError: `fraction` outside of 0 ... 1, or a class that is too small to be split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction to hold out must lie between 0 and 1, got {fraction}.")
    try:
        split = dataset.train_test_split(fraction, stratify_by_column=LABEL, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"{fraction:.0%} of the {len(dataset)} images cannot be held out of every class ({error}). Give images to "
            "evaluate on."
        ) from error
    return split["train"], split["test"]


def keep_classes(dataset: Dataset, class_names: Sequence[str], label_column: str = LABEL) -> Dataset:
    """The examples of some classes only, their labels numbered anew: the i-th of `class_names` becomes label i.

    Args:
        dataset: with a `ClassLabel` column.
        class_names: names out of that column's, in the order wanted.
        label_column: its name.

    Raises:
        ValueError: the column holds no class names, or lacks one of `class_names`.
    """
    feature = _class_label(dataset, label_column)
    missing = [name for name in class_names if name not in feature.names]
    if missing:
        raise ValueError(
            f"The data set has no class {missing[0]!r} ({len(missing)} of {len(class_names)} are missing); its "
            f"classes are {', '.join(feature.names[:10])}{', ...' if feature.num_classes > 10 else ''}."
        )
    kept_labels = {feature.str2int(name): new for new, name in enumerate(class_names)}
    labels = read_labels(dataset, label_column)
    kept = dataset.select([i for i, label in enumerate(labels) if label in kept_labels])
    new_labels = [kept_labels[label] for label in labels if label in kept_labels]
    columns, numbered_anew = kept.column_names, f"{label_column} numbered anew"
    kept = kept.add_column(numbered_anew, new_labels, feature=ClassLabel(names=list(class_names)))
    return kept.remove_columns(label_column).rename_column(numbered_anew, label_column).select_columns(columns)


def base_new_names(class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The base classes, which are the first half of the labels (the larger, of an odd number), and the new ones.

    Source: `subsample_classes` of https://github.com/KaiyangZhou/CoOp (datasets/oxford_pets.py).

    Raises:
        ValueError: fewer than two classes.
    """
    if len(class_names) < 2:
        raise ValueError(f"Base and new classes need at least two classes, got {list(class_names)}.")
    num_base = math.ceil(len(class_names) / 2)
    return list(class_names[:num_base]), list(class_names[num_base:])


def split_base_new(dataset: Dataset, label_column: str = LABEL) -> tuple[Dataset, Dataset]:
    """Divides a data set by class as the base-to-new protocol does; labels of either half count from 0.

    The few-shot draw comes first in CoOp's code, so, to draw the same images, `sample_few_shot` before this.

    Returns:
        The examples of the base and of the new classes, see [`base_new_names`].

    Raises:
        ValueError: the column holds no class names, or fewer than two.
    """
    base, new = base_new_names(_class_label(dataset, label_column).names)
    return keep_classes(dataset, base, label_column), keep_classes(dataset, new, label_column)


def _class_label(dataset: Dataset, label_column: str) -> ClassLabel:
    feature = dataset.features.get(label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} {'is missing' if feature is None else f'is a {feature}'}, but classes are "
            f"told apart by a ClassLabel column (columns: {', '.join(dataset.column_names)})."
        )
    return feature
