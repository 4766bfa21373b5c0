"""From label names, as data sets spell them, to class names that fit into a sentence."""

from __future__ import annotations

import re

from datasets import ClassLabel, Dataset

from ..class_prompts import check_class_names


def clean_class_name(name: str, split_camel_case: bool = False) -> str:
    """Writes a label name as words: `_` becomes a space, runs of white space become one. Case is kept.

    Args:
        name: as the data set has it.
        split_camel_case: also put a space in front of every capital letter that follows a small one.

    Example:

    ```py
    >>> clean_class_name("American_bulldog")
    'American bulldog'
    >>> clean_class_name("ApplyEyeMakeup", split_camel_case=True)
    'Apply Eye Makeup'
    ```
    """
    if split_camel_case:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(name.replace("_", " ").split())


def class_names_of(dataset: Dataset, label_column: str = "label") -> list[str]:
    """The class names of a data set, cleaned with [`clean_class_name`], in the order of the labels.

    Args:
        dataset: with a `ClassLabel` column.
        label_column: its name.

    Returns:
        C names; the name of label i stands at i.

    Raises:
        ValueError: the column is missing or holds no class names, or two names are equal once cleaned.
    """
    feature = dataset.features.get(label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} {'is missing' if feature is None else f'is a {feature}'}, but class names "
            f"are read from a ClassLabel column (columns: {', '.join(dataset.features)}). For a column of strings use "
            "dataset.class_encode_column(...)."
        )
    return check_class_names([clean_class_name(name) for name in feature.names])
