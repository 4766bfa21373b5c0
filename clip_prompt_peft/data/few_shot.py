"""Few-shot samples, held-out splits and subsets of the classes of a dataset.

The few-shot sample is the one of CoOp, which later methods compare themselves on: `generate_fewshot_dataset` of Dassl
(https://github.com/KaiyangZhou/Dassl.pytorch, dassl/data/datasets/base_dataset.py), called as in
https://github.com/KaiyangZhou/CoOp (datasets/oxford_pets.py). With the same examples in the same order and the same
seed, the same examples are drawn in the same order.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset

from .columns import (
    LABEL,
    check_is_no_stream,
    check_is_one_split,
    class_label_of,
    read_labels,
    unlabeled_rows,
    with_known_types,
)


WHEN_FEWER = ("error", "all", "repeat")
MAX_VALIDATION_SHOTS = 4  # CoOp, datasets/oxford_pets.py


def sample_few_shot(
    dataset: Dataset | IterableDataset,
    num_shots: int,
    label_column: str = LABEL,
    seed: int = 1,
    when_fewer: str = "error",
) -> Dataset:
    """
    Draws `num_shots` examples of each class.

    A stream is read once, to its end. Each set of `num_shots` examples of a class is drawn with the same probability,
    as from a dataset, but not the same set as from a dataset with that seed. Only drawn examples are kept in memory.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            The training examples.
        num_shots (`int`):
            The number of examples per class.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column with the class of each example.
        seed (`int`, *optional*, defaults to 1):
            The seed of Python's random generator. Published results are averages over the seeds 1, 2 and 3.
        when_fewer (`str`, *optional*, defaults to `"error"`):
            How to treat a class with fewer than `num_shots` examples: raise an `"error"`, take `"all"` of them (as
            current versions of Dassl do), or draw `num_shots` with replacement (`"repeat"`, as older versions did).

    Returns:
        `datasets.Dataset`: The drawn examples, grouped by class in the order in which the classes first appear.

    Raises:
        ValueError: If a class has too few examples (with `"error"`), `num_shots` is below 1, or the column is missing.

    Example:

    ```py
    >>> few = sample_few_shot(dataset, num_shots=16, seed=1)
    ```
    """
    check_is_one_split(dataset)
    if isinstance(dataset, IterableDataset):
        return _draw_from_stream(dataset, num_shots, label_column, when_fewer, random.Random(seed))
    return dataset.select(_draw(dataset, num_shots, label_column, when_fewer, random.Random(seed)))


def _draw_from_stream(
    stream: IterableDataset, num_shots: int, label_column: str, when_fewer: str, rng: random.Random
) -> Dataset:
    """Draws from each class by reservoir sampling: the i-th example replaces a kept one with probability k / i."""
    _check_settings(num_shots, when_fewer)
    stream = with_known_types(stream, label_column, once=True)
    if label_column not in stream.features:
        raise ValueError(f"There is no column {label_column!r}; the columns are {', '.join(stream.features)}.")
    types = stream.features.copy()
    for name, feature in types.items():  # images stay files until they are used
        if isinstance(feature, Image):
            types[name] = Image(mode=feature.mode, decode=False)
            stream = stream.cast_column(name, types[name])
    kept: dict[Hashable, list[dict]] = {}
    counts: Counter = Counter()
    for row, example in enumerate(stream):
        label = example[label_column]
        if unlabeled_rows([label], types[label_column]):
            raise ValueError(_without_label([row], label, label_column))
        group = kept.setdefault(label, [])
        counts[label] += 1
        if len(group) < num_shots:
            group.append(example)
        elif (place := rng.randrange(counts[label])) < num_shots:
            group[place] = example
    _check_counts(counts, num_shots, when_fewer, getattr(types[label_column], "names", None))
    drawn = []
    for group in kept.values():
        short = len(group) < num_shots and when_fewer == "repeat"
        drawn += rng.choices(group, k=num_shots) if short else group
    return Dataset.from_list(drawn, features=types).cast(_decoded(types))


def _decoded(types: Features) -> Features:
    """Returns the types with images that are decoded when they are used."""
    return Features({name: Image(mode=kind.mode) if isinstance(kind, Image) else kind for name, kind in types.items()})


def sample_few_shot_splits(
    train: Dataset,
    validation: Dataset,
    num_shots: int,
    label_column: str = LABEL,
    seed: int = 1,
    when_fewer: str = "error",
) -> tuple[Dataset, Dataset]:
    """
    Draws `num_shots` training examples and then `min(num_shots, 4)` validation examples of each class.

    Both draws use the same generator, so the training examples are those of [`sample_few_shot`]. See there for the
    arguments.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The drawn training and validation examples.
    """
    rng = random.Random(seed)
    drawn_train = _draw(train, num_shots, label_column, when_fewer, rng)
    drawn_validation = _draw(validation, min(num_shots, MAX_VALIDATION_SHOTS), label_column, when_fewer, rng)
    return train.select(drawn_train), validation.select(drawn_validation)


def _draw(dataset: Dataset, num_shots: int, label_column: str, when_fewer: str, rng: random.Random) -> list[int]:
    """Returns the indices of the drawn examples."""
    _check_settings(num_shots, when_fewer)
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(_read_all_labels(dataset, label_column)):
        groups.setdefault(label, []).append(index)
    counts = {label: len(group) for label, group in groups.items()}
    _check_counts(counts, num_shots, when_fewer, getattr(dataset.features[label_column], "names", None))
    drawn = []
    for group in groups.values():
        if len(group) >= num_shots:
            drawn += rng.sample(group, num_shots)
        else:
            drawn += group if when_fewer == "all" else rng.choices(group, k=num_shots)
    return drawn


def _read_all_labels(dataset: Dataset, label_column: str) -> list[Hashable]:
    """Returns all labels. Raises `ValueError` if rows have none."""
    labels = read_labels(dataset, label_column)
    unlabeled = unlabeled_rows(labels, dataset.features[label_column])
    if unlabeled:
        raise ValueError(_without_label(unlabeled, labels[unlabeled[0]], label_column))
    return labels


def _without_label(rows: list[int], label: int | None, label_column: str) -> str:
    more = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
    return (
        f"Row {rows[0]} has no label, but {label} in the column {label_column!r}{more}. Leave such rows out: "
        f"dataset.filter(lambda label: label is not None and label != -1, input_columns={label_column!r})."
    )


def _check_settings(num_shots: int, when_fewer: str) -> None:
    if not isinstance(num_shots, int) or num_shots < 1:
        raise ValueError(f"num_shots must be a positive integer, got {num_shots!r}.")
    if when_fewer not in WHEN_FEWER:
        raise ValueError(f"when_fewer must be one of {', '.join(map(repr, WHEN_FEWER))}, got {when_fewer!r}.")


def _check_counts(counts: Mapping[Hashable, int], num_shots: int, when_fewer: str, names: list[str] | None) -> None:
    short = {label: count for label, count in counts.items() if count < num_shots}
    if short and when_fewer == "error":
        listed = _first_ten([f"{names[label] if names else label} {count}" for label, count in short.items()])
        raise ValueError(
            f"num_shots={num_shots}, but {len(short)} of {len(counts)} classes have fewer ({listed}). Use at most "
            f"{min(short.values())}, or when_fewer='all' or 'repeat'."
        )


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def hold_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Splits off a fraction of the examples of each class for evaluation.

    Args:
        dataset (`datasets.Dataset`):
            A dataset with the column `label`.
        fraction (`float`):
            The share of the examples to hold out, between 0 and 1.
        seed (`int`, *optional*, defaults to 0):
            The seed of the split.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The remaining training examples and the held-out examples.

    Raises:
        ValueError: If `fraction` is not between 0 and 1, a row has no label, or a class is too small to be split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction to hold out must lie between 0 and 1, got {fraction}.")
    check_is_no_stream(dataset)
    if LABEL in dataset.column_names:
        _read_all_labels(dataset, LABEL)
    try:
        split = dataset.train_test_split(fraction, stratify_by_column=LABEL, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"{fraction:.0%} of the {len(dataset)} images cannot be held out of every class ({error}). Give images to "
            "evaluate on."
        ) from error
    return split["train"], split["test"]


def keep_classes(dataset: Dataset, class_names: Sequence[str], label_column: str = LABEL) -> Dataset:
    """
    Keeps the examples of the given classes and renumbers their labels from 0.

    Args:
        dataset (`datasets.Dataset`):
            A dataset with a `ClassLabel` column.
        class_names (`Sequence[str]`):
            The names of the classes to keep. The i-th name becomes label i.
        label_column (`str`, *optional*, defaults to `"label"`):
            The name of the `ClassLabel` column.

    Raises:
        ValueError: If the column has no class names, or lacks one of `class_names`.
    """
    feature = class_label_of(dataset, label_column)
    missing = [name for name in class_names if name not in feature.names]
    if missing:
        raise ValueError(
            f"The dataset has no class {missing[0]!r} ({len(missing)} of {len(class_names)} are missing); its classes "
            f"are {_first_ten(feature.names)}."
        )
    new_label_of = {feature.str2int(name): new for new, name in enumerate(class_names)}
    labels = read_labels(dataset, label_column)
    kept = dataset.select([index for index, label in enumerate(labels) if label in new_label_of])
    new_labels = [new_label_of[label] for label in labels if label in new_label_of]
    # The new column is added before the old one is removed: a dataset without columns loses its length.
    temporary = f"new {label_column}"
    kept = kept.add_column(temporary, new_labels, feature=ClassLabel(names=list(class_names)))
    kept = kept.remove_columns(label_column).rename_column(temporary, label_column)
    return kept.select_columns(dataset.column_names)


def base_new_names(class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Splits the class names into the base classes (the first half, rounded up) and the new classes.

    Source:
        `subsample_classes` of https://github.com/KaiyangZhou/CoOp (datasets/oxford_pets.py).

    Raises:
        ValueError: If there are fewer than two classes.
    """
    if len(class_names) < 2:
        raise ValueError(f"Base and new classes need at least two classes, got {list(class_names)}.")
    num_base = math.ceil(len(class_names) / 2)
    return list(class_names[:num_base]), list(class_names[num_base:])


def split_base_new(dataset: Dataset, label_column: str = LABEL) -> tuple[Dataset, Dataset]:
    """
    Splits a dataset into base and new classes, see [`base_new_names`]. The labels of each half start at 0.

    CoOp's code draws the few-shot sample first. To draw the same images, call [`sample_few_shot`] before this.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The examples of the base classes and of the new classes.

    Raises:
        ValueError: If the column has no class names, or fewer than two.
    """
    base, new = base_new_names(class_label_of(dataset, label_column).names)
    return keep_classes(dataset, base, label_column), keep_classes(dataset, new, label_column)
