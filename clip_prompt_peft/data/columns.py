"""Finding the image and the label column of a data set."""

from __future__ import annotations

from datasets import ClassLabel, Features, Image, Value


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
