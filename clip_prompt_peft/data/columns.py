"""Finding the image and the label column of a data set."""

from __future__ import annotations

import re
from collections.abc import Hashable

from datasets import ClassLabel, Dataset, Features, Image, Value

from ..templates import check_class_names


USUAL_LABEL_NAMES = ("label", "labels", "class", "target")


READABLE = (Value("string"), Value("binary"))


NEEDED = {
    "image": "images, their bytes, or paths to them",
    "label": "a ClassLabel, or strings (numbers alone do not say what the classes are called)",
}


def find_image_column(features: Features, name: str | None = None) -> str:
    """The column that holds the images: the one named, otherwise the only one that holds `Image`s or their bytes.

    A named column may also hold paths or plain bytes, which `datasets` can read as images.

    Raises:
        ValueError: the named column is missing or holds no images; none, or more than one, is found.
    """
    if name is not None:
        return _check_named(features, name, "image", lambda feature: _is_image(feature) or feature in READABLE)
    return _the_only([key for key, feature in features.items() if _is_image(feature)], "image", features)


def find_label_column(features: Features, name: str | None = None) -> str:
    """The column that holds the labels: the one named, otherwise the only `ClassLabel`, otherwise strings under a
    usual name.

    Where there are several of a kind, one named `label`, `labels`, `class` or `target` is preferred.

    Raises:
        ValueError: the named column is missing or of a type without class names; none, or more than one, is found.
    """
    if name is not None:
        return _check_named(features, name, "label", _has_class_names)
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [key for key in labels or features if key in USUAL_LABEL_NAMES and _has_class_names(features[key])]
    return _the_only(usual[:1] or labels, "label", features)


def describe(features: Features) -> str:
    """The columns and their types on one line."""
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())


def _is_image(feature) -> bool:
    # parquet files that `datasets` did not write hold images as records of bytes and path
    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.get("bytes") == Value("binary"))


def _has_class_names(feature) -> bool:
    return isinstance(feature, ClassLabel) or feature == Value("string")


def _check_named(features: Features, name: str, kind: str, fits) -> str:
    if name not in features or not fits(features[name]):
        problem = "does not exist" if name not in features else f"holds {_type_name(features[name])}"
        raise ValueError(
            f"The {kind} column {name!r} {problem}; needed is a column of {NEEDED[kind]}. The columns are: "
            f"{describe(features)}."
        )
    return name


def _the_only(found: list[str], kind: str, features: Features) -> str:
    if len(found) != 1:
        problem = f"More than one column could hold the {kind}s ({', '.join(found)})" if found else f"No {kind} column"
        raise ValueError(
            f"{problem}; name it with {kind}_column. Needed is a column of {NEEDED[kind]}. The columns are: "
            f"{describe(features)}."
        )
    return found[0]


def _type_name(feature) -> str:
    if isinstance(feature, ClassLabel):
        return f"ClassLabel of {feature.num_classes}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


IMAGE, LABEL = "image", "label"


def read_labels(dataset: Dataset, label_column: str) -> list[Hashable]:
    """All values of a column, without decoding the images beside it."""
    if label_column not in dataset.column_names:
        raise ValueError(f"There is no column {label_column!r}; the columns are {', '.join(dataset.column_names)}.")
    column = dataset.select_columns(label_column).with_format("arrow")
    return column[:][label_column].to_pylist()


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
