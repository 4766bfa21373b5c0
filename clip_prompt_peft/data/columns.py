"""The image column, the label column and the class names of a dataset."""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..class_names import describe_invisible, invisible_characters, without_invisible
from ..templates import check_class_names, how_to_renumber


logger = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"  # the column names of every dataset that this package returns

USUAL_LABEL_NAMES = ("label", "labels", "class", "target")
TEXTS = ("string", "large_string", "string_view")  # the Arrow types of text
BYTES = ("binary", "large_binary", "binary_view")
EXPECTED = {
    "image": "images, their bytes, or paths to them (arrays become images by PIL.Image.fromarray)",
    "label": "type ClassLabel or string (numbers alone do not say what the classes are called: put names in their "
    "place, or cast the column to ClassLabel(names=[...]))",
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
    found = [key for key, feature in features.items() if is_image(feature)]
    fits = (is_image, is_text, is_bytes)
    return _choose(features, "image", name, found, lambda feature: any(kind(feature) for kind in fits))


def find_label_column(features: Features, name: str | None = None) -> str:
    """
    Returns the name of the column that holds the labels.

    Args:
        features (`datasets.Features`):
            The columns of the dataset.
        name (`str`, *optional*):
            The column to use. By default, the only `ClassLabel` column or, without one, a string column. Among several
            candidates, and for string columns always, the name must be `label`, `labels`, `class` or `target`. If
            several columns have such a name, `label` is taken, with a warning that names the others. So does a
            `ClassLabel` of another name beside a column of such a name.

    Raises:
        ValueError: If the named column is missing or has no class names, or if no label column can be determined, as
            when several columns have such a name, but none is called `label`.
    """
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [key for key in labels or features if key in USUAL_LABEL_NAMES and _has_class_names(features[key])]
    if name is None and LABEL in usual and len(usual) > 1:
        others = [key for key in usual if key != LABEL]
        logger.warning(
            "The labels are read from the column %r, and not from %s; name another one with label_column.",
            LABEL,
            others,
        )
        usual = [LABEL]
    column = _choose(features, "label", name, usual or labels, _has_class_names)
    if name is None and column != LABEL:
        fits = _has_class_names if column in USUAL_LABEL_NAMES else (lambda feature: not is_image(feature))
        others = [key for key in features if key in USUAL_LABEL_NAMES and key != column and fits(features[key])]
        if others:
            logger.warning(
                "The labels are read from the column %r (%s), and not from %s; name another one with label_column.",
                column,
                type_name(features[column]),
                ", ".join(f"{key!r} ({type_name(features[key])})" for key in others),
            )
    return column


def is_image(feature) -> bool:
    """Returns whether a column holds images."""
    # Parquet files that were not written by `datasets` hold images as records of bytes and path.
    if not isinstance(feature, dict):
        return isinstance(feature, Image)
    only_paths = feature.get("bytes") == Value("null") and is_text(feature.get("path"))
    return only_paths or is_bytes(feature.get("bytes"))


def is_text(feature) -> bool:
    """Returns whether a column holds text. pandas and polars write it as other Arrow types than `datasets`."""
    return isinstance(feature, Value) and feature.dtype in TEXTS


def is_bytes(feature) -> bool:
    """Returns whether a column holds bytes."""
    return isinstance(feature, Value) and feature.dtype in BYTES


def as_image_column(dataset: Dataset) -> Dataset:
    """Gives the column `image`, which holds images in any of the accepted forms, the type `Image`."""
    feature = dataset.features[IMAGE]
    if isinstance(feature, Image):
        return dataset
    if isinstance(feature, dict):  # in any order, with further fields, with or without a path
        records = Features({IMAGE: {"bytes": Value("binary"), "path": Value("string")}})
        others = {name: kept for name, kept in dataset.features.items() if name != IMAGE}
        form = dataset.format  # with a transform, `map` would write what it returns
        dataset = dataset.with_format(None)
        dataset = dataset.map(_bytes_and_path, input_columns=IMAGE, features=Features({**others, **records}))
        dataset.set_format(form["type"], **form["format_kwargs"])
    else:
        dataset = dataset.cast_column(IMAGE, Value("string" if is_text(feature) else "binary"))
    return dataset.cast_column(IMAGE, Image())


def _bytes_and_path(image: dict | None) -> dict:
    return {IMAGE: image and {name: image.get(name) for name in ("bytes", "path")}}


def _has_class_names(feature) -> bool:
    return isinstance(feature, ClassLabel) or is_text(feature)


def _choose(features: Features, kind: str, name: str | None, found: list[str], fits: Callable[..., bool]) -> str:
    """Returns the named column if it fits, or the only one found."""
    if name is None and len(found) == 1:
        return found[0]
    if name in features and fits(features[name]):
        return name
    if name is not None:
        holds = f"holds {type_name(features[name])}" if name in features else "does not exist"
        problem = f"The {kind} column {name!r} {holds}"
    elif found:
        problem = f"More than one column could hold the {kind}s ({', '.join(found)}); name one with {kind}_column"
    else:
        problem = f"No {kind} column; name it with {kind}_column"
    columns = ", ".join(f"{key} ({type_name(feature)})" for key, feature in features.items())
    hint = _hint_at_several_labels(features, name) if kind == "label" else ""
    raise ValueError(f"{problem}. Expected a column of {EXPECTED[kind]}. The columns are: {columns}.{hint}")


def _hint_at_several_labels(features: Features, name: str | None) -> str:
    """Returns what to do with lists of labels, and with a column of numbers for each class."""
    of_lists = [key for key in features if key in (name, *USUAL_LABEL_NAMES) and "List" in type_name(features[key])]
    if of_lists:
        return (
            f" The lists of {of_lists[0]!r} hold several labels, or a number for each class. A classifier gives one "
            "class to an image: write the name of one in a column of its own."
        )
    numbers = [
        key for key, kind in features.items() if isinstance(kind, Value) and kind.dtype[:3] in ("int", "flo", "boo")
    ]
    if name is None and len(numbers) > 1 and not set(numbers) & set(USUAL_LABEL_NAMES):
        return (
            f" If each class has a column of 0 and 1, such as {numbers[0]!r} and {numbers[1]!r}, make one column of "
            "their names, with pandas: frame['label'] = frame[NAMES].idxmax(axis=1)."
        )
    return ""


def type_name(feature) -> str:
    """Returns the type of a column as an error message names it."""
    if isinstance(feature, ClassLabel):
        return f"ClassLabel of {feature.num_classes}"
    if feature == Value("null"):
        return "null, no values"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def check_is_one_split(dataset: Dataset) -> None:
    """Raises `TypeError` for several splits, as `load_image_dataset` and `load_dataset` return them."""
    if isinstance(dataset, dict):
        raise TypeError(
            f"Expected the images of one split, got a {type(dataset).__name__} of {', '.join(map(repr, dataset))}; "
            f"take one of them, such as dataset[{next(iter(dataset), 'train')!r}]."
        )


def check_is_no_stream(dataset: Dataset) -> None:
    """Raises `TypeError` unless all labels can be read at once."""
    check_is_one_split(dataset)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"This needs all labels at once, which a {type(dataset).__name__} does not give; load it without "
            "streaming=True, or draw a few images of each class with sample_few_shot."
        )


def read_labels(dataset: Dataset, label_column: str) -> list[Hashable]:
    """Returns all N values of a column, without decoding the images beside it."""
    check_is_no_stream(dataset)
    if label_column not in dataset.column_names:
        raise ValueError(f"There is no column {label_column!r}; the columns are {', '.join(dataset.column_names)}.")
    return dataset.select_columns(label_column).with_format("arrow")[:][label_column].to_pylist()


def with_known_types(stream: IterableDataset, label_column: str | None = LABEL, once: bool = False) -> IterableDataset:
    """Gives the images and labels of a stream without types those of its first example; other columns are dropped.

    Args:
        stream (`datasets.IterableDataset`):
            A stream, for example from a generator, with the columns `image` and `label_column`.
        label_column (`str`, *optional*, defaults to `"label"`):
            The name of the label column. `None` leaves labels out.
        once (`bool`, *optional*, defaults to `False`):
            Whether the result is read once only. Then the stream is not started again after its first example, which a
            stream of something that cannot be read twice would have lost.

    Raises:
        ValueError: If the stream is empty or lacks one of the columns.
    """
    if stream.features is not None:
        return stream
    examples = iter(stream)
    first = next(examples, None)
    if first is None:
        raise ValueError("The stream has no examples.")
    kept = [IMAGE] if label_column is None else [IMAGE, label_column]
    missing = [name for name in kept if name not in first]
    if missing:
        raise ValueError(f"The stream has no column {missing[0]!r}; its columns are {', '.join(first)}.")
    types = Features({IMAGE: Image()})
    if label_column is not None:
        types[label_column] = Dataset.from_list([{label_column: first[label_column]}]).features[label_column]
    if once:
        stream = IterableDataset.from_generator(_Pass(chain([first], examples)))
    return stream.select_columns(kept).cast(types)


class _Pass:
    """A generator function of a pass that has begun. `datasets` copies and hashes it, as no iterator can be."""

    def __init__(self, examples: Iterator[dict]) -> None:
        self.examples = examples

    def __call__(self) -> Iterator[dict]:
        return self.examples

    def __deepcopy__(self, memo: dict) -> _Pass:
        return self

    def __reduce__(self):
        return type(self), (iter(()),)


def check_labels_are_numbers(dataset: Dataset, label_column: str = LABEL) -> None:
    """Raises `ValueError` if a label is missing, or if the labels are strings, lists, ...

    Args:
        dataset (`datasets.Dataset`):
            A dataset whose labels a model is to be trained with.
        label_column (`str`, *optional*, defaults to `"label"`):
            The name of the column. Nothing is checked if there is none.

    Raises:
        TypeError: If it holds several splits.
    """
    check_is_one_split(dataset)
    feature = (dataset.features or {}).get(label_column)
    if feature is None:
        return
    is_number = isinstance(feature, Value) and feature.dtype.startswith(("bool", "int", "uint", "float"))
    if not is_number and not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} holds {type_name(feature)}, but training needs one number for each image. "
            f"Turn names into numbers with dataset.class_encode_column({label_column!r}), or load the dataset with "
            "load_image_dataset."
        )
    if not isinstance(dataset, Dataset):
        return  # a stream is read only once
    labels = dataset.select_columns(label_column).with_format("arrow")[:][label_column]
    if labels.null_count:
        row = labels.is_null().index(True).as_py()
        raise ValueError(
            f"{labels.null_count} of {len(labels)} rows have no value in the column {label_column!r}, such as row "
            f"{row}; leave them out with dataset.filter(lambda label: label is not None, "
            f"input_columns={label_column!r})."
        )


def plain_name(class_name: str) -> str:
    """Returns a class name without case, extra spaces, underscores and ways to store accents, for comparisons."""
    return _normal_name(class_name).casefold()


def _normal_name(class_name: str) -> str:
    return unicodedata.normalize("NFC", clean_class_name(class_name))


def check_label_order(dataset: Dataset, class_names: Sequence[str] | None, label_column: str = LABEL) -> None:
    """Checks that no class of a data set is another class of a model. Names that only one of them has may differ.

    A model of fewer or more classes is only warned about: the labels may be renumbered after the images are embedded.

    Args:
        dataset (`datasets.Dataset`):
            The data set. Nothing is checked unless its labels are a `ClassLabel`.
        class_names (`Sequence[str]`, *optional*):
            The classes of the model. Nothing is checked without them.
        label_column (`str`, *optional*, defaults to `"label"`):
            The name of the label column.

    Raises:
        ValueError: If they have as many classes and one of the same name has another number.
    """
    feature = (dataset.features or {}).get(label_column)
    if class_names is None or not isinstance(feature, ClassLabel):
        return
    number_of = {name: number for number, name in enumerate(class_names)}
    spelled_otherwise = {plain_name(name): number for name, number in number_of.items()}
    if len(spelled_otherwise) < len(number_of) or len(set(map(plain_name, feature.names))) < len(feature.names):
        spelled_otherwise = {}  # classes of one side differ in case only
    for label, spelled in enumerate(feature.names):
        exact = number_of.get(spelled, number_of.get(clean_class_name(spelled)))
        number = spelled_otherwise.get(plain_name(spelled)) if exact is None else exact
        if number in (None, label):
            continue
        problem = (
            f"The data set and the model have the same classes in another order: label {label} of the data set is "
            f"{spelled!r}, and class {number} of the model is {class_names[number]!r}."
        )
        if len(feature.names) == len(class_names):
            raise ValueError(
                f"{problem} Give the model the data set's names in their order, "
                "model.set_class_names(class_names_of(dataset)), or renumber the data set with "
                f"{how_to_renumber(label_column)}."
            )
        warnings.warn(
            f"{problem} Do not train or evaluate with these labels before they are renumbered, for example by "
            "keep_classes(dataset, model.class_names).",
            stacklevel=3,
        )
        return


def class_label_of(dataset: Dataset, label_column: str) -> ClassLabel:
    """Returns the type of a label column, which must be a `ClassLabel`."""
    check_is_one_split(dataset)
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
    names = class_label_of(dataset, label_column).names
    check_names_differ(names)
    invisible = {name: found for name in names if (found := invisible_characters(name))}
    if invisible:
        warnings.warn(  # of this line, so that it is told once
            f"Characters that nobody sees are left out of class names: {describe_invisible(invisible)}.", stacklevel=1
        )
    return check_class_names([clean_class_name(name) for name in names])


def check_names_differ(names: Sequence[str]) -> None:
    """Raises `ValueError` if two classes have the same name but for spaces, underscores, or how accents are stored."""
    spellings: dict[str, str] = {}
    for name in names:
        other = spellings.setdefault(_normal_name(name), name)
        if other is not name:
            differ_in_spaces = " ".join(other.replace("_", " ").split()) == " ".join(name.replace("_", " ").split())
            shown = repr if differ_in_spaces else ascii
            raise ValueError(
                f"A class name stands there twice, as {shown(other)} and {shown(name)}, which differ in spaces, "
                "underscores, invisible characters or how accents are stored (NFC and NFD) only. If they are one "
                "class, give it one name everywhere; otherwise rename one."
            )


def unlabeled_rows(labels: Sequence, feature) -> list[int]:
    """Returns the rows without a label: those with none, NaN or, if they are a `ClassLabel`, with a negative one."""
    is_class = isinstance(feature, ClassLabel)
    return [
        row
        for row, label in enumerate(labels)
        if label is None or label != label or (is_class and label < 0)  # NaN alone differs from itself
    ]


def clean_class_name(name: str, split_camel_case: bool = False) -> str:
    """
    Turns a label name into words by replacing underscores with spaces and collapsing white space. Case is kept.

    Characters that nobody sees, such as a space of no width or a soft hyphen, are left out.

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
    return " ".join(without_invisible(name).replace("_", " ").split())
