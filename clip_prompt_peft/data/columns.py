"""The image column, the label column and the class names of a dataset."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable

from datasets import ClassLabel, Dataset, Features, Image, Value

from ..templates import check_class_names


IMAGE, LABEL = "image", "label"  # the column names of every dataset that this package returns

USUAL_LABEL_NAMES = ("label", "labels", "class", "target")
READABLE_AS_IMAGE = (Value("string"), Value("binary"))
EXPECTED = {
    "image": "images, their bytes, or paths to them",
    "label": "type ClassLabel or string (numbers alone do not say what the classes are called)",
}


def find_image_column(features: Features, name: str | None = None) -> str:
    """
    Returns the name of the column that holds the images.

    Args:
        features (`datasets.Features`):
            The columns of the dataset.
        name (`str`, *optional*):
            The column to use. It may also hold paths or plain bytes, which `datasets` can read as images. By default,
            the only column of type `Image`, or of records with the bytes of an image.

    Raises:
        ValueError: If the named column is missing or cannot hold images, or if there is not exactly one image column.
    """
    found = [key for key, feature in features.items() if _is_image(feature)]
    return _choose(features, "image", name, found, lambda feature: _is_image(feature) or feature in READABLE_AS_IMAGE)


def find_label_column(features: Features, name: str | None = None) -> str:
    """
    Returns the name of the column that holds the labels.

    Args:
        features (`datasets.Features`):
            The columns of the dataset.
        name (`str`, *optional*):
            The column to use. By default, the only `ClassLabel` column or, without one, a string column. Among several
            candidates, and for string columns always, the name must be `label`, `labels`, `class` or `target`.

    Raises:
        ValueError: If the named column is missing or has no class names, or if no label column can be determined.
    """
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [key for key in labels or features if key in USUAL_LABEL_NAMES and _has_class_names(features[key])]
    return _choose(features, "label", name, usual[:1] or labels, _has_class_names)


def _is_image(feature) -> bool:
    # Parquet files that were not written by `datasets` hold images as records of bytes and path.
    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.get("bytes") == Value("binary"))


def _has_class_names(feature) -> bool:
    return isinstance(feature, ClassLabel) or feature == Value("string")


def _choose(features: Features, kind: str, name: str | None, found: list[str], fits: Callable[..., bool]) -> str:
    """Returns the named column if it fits, or the only one found."""
    if name is None and len(found) == 1:
        return found[0]
    if name in features and fits(features[name]):
        return name
    if name is not None:
        holds = f"holds {_type_name(features[name])}" if name in features else "does not exist"
        problem = f"The {kind} column {name!r} {holds}"
    elif found:
        problem = f"More than one column could hold the {kind}s ({', '.join(found)}); name one with {kind}_column"
    else:
        problem = f"No {kind} column; name it with {kind}_column"
    columns = ", ".join(f"{key} ({_type_name(feature)})" for key, feature in features.items())
    raise ValueError(f"{problem}. Expected a column of {EXPECTED[kind]}. The columns are: {columns}.")


def _type_name(feature) -> str:
    if isinstance(feature, ClassLabel):
        return f"ClassLabel of {feature.num_classes}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def read_labels(dataset: Dataset, label_column: str) -> list[Hashable]:
    """Returns all N values of a column, without decoding the images beside it."""
    if label_column not in dataset.column_names:
        raise ValueError(f"There is no column {label_column!r}; the columns are {', '.join(dataset.column_names)}.")
    return dataset.select_columns(label_column).with_format("arrow")[:][label_column].to_pylist()


def class_label_of(dataset: Dataset, label_column: str) -> ClassLabel:
    """Returns the type of a label column, which must be a `ClassLabel`."""
    feature = dataset.features.get(label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} {'is missing' if feature is None else f'is a {feature}'}, but class names "
            f"are read from a ClassLabel column (columns: {', '.join(dataset.features)}). Convert a column of strings "
            "with dataset.class_encode_column(...)."
        )
    return feature


def class_names_of(dataset: Dataset, label_column: str = LABEL) -> list[str]:
    """
    Returns the class names of a dataset, cleaned with [`clean_class_name`].

    Args:
        dataset (`datasets.Dataset`):
            A dataset with a `ClassLabel` column.
        label_column (`str`, *optional*, defaults to `"label"`):
            The name of that column.

    Returns:
        `list[str]`: The C class names, in the order of the labels.

    Raises:
        ValueError: If the column is missing or has no class names, or if two cleaned names are equal.
    """
    return check_class_names([clean_class_name(name) for name in class_label_of(dataset, label_column).names])


def clean_class_name(name: str, split_camel_case: bool = False) -> str:
    """
    Turns a label name into words by replacing underscores with spaces and collapsing white space. Case is kept.

    Args:
        name (`str`):
            The name used by the dataset.
        split_camel_case (`bool`, *optional*, defaults to `False`):
            Whether to insert a space before each uppercase letter that follows a lowercase one.

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
