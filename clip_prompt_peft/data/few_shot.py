"""Drawing a few images of every class, as the few-shot literature of CLIP does.

The draw is that of CoOp, which every later method compares itself on: `DatasetBase.generate_fewshot_dataset` of Dassl
(https://github.com/KaiyangZhou/Dassl.pytorch, dassl/data/datasets/base_dataset.py), called as in
https://github.com/KaiyangZhou/CoOp (datasets/oxford_pets.py). For the same items in the same order and the same seed
the same items come out, in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence

from datasets import ClassLabel, Dataset

from .columns import LABEL, read_labels


WHEN_FEWER = ("error", "all", "repeat")


MAX_VALIDATION_SHOTS = 4  # CoOp, datasets/oxford_pets.py


def sample_few_shot(
    dataset: Dataset,
    num_shots: int,
    label_column: str = "label",
    seed: int = 1,
    when_fewer: str = "error",
) -> Dataset:
    """Draws `num_shots` examples of every class.

    Args:
        dataset: the training examples.
        num_shots: how many of each class, k.
        label_column: name of the column to group by.
        seed: of Python's random generator; published results are means over the seeds 1, 2, 3.
        when_fewer: what to do with a class of fewer than `num_shots` examples: `"error"`, take `"all"` of them (as
            Dassl does now), or draw `num_shots` with repetition (`"repeat"`, as Dassl did before).

    Returns:
        The drawn examples, class by class in the order in which the classes first appear.

    Raises:
        ValueError: fewer examples than asked for (with `"error"`), `num_shots` below 1, or no such column.

    Example:

    ```py
    >>> few = sample_few_shot(dataset, num_shots=16, seed=1)
    ```
    """
    return dataset.select(_draw(dataset, num_shots, label_column, when_fewer, random.Random(seed)))


def sample_few_shot_splits(
    train: Dataset,
    validation: Dataset,
    num_shots: int,
    label_column: str = "label",
    seed: int = 1,
    when_fewer: str = "error",
) -> tuple[Dataset, Dataset]:
    """As [`sample_few_shot`], and then, with the same generator, `min(num_shots, 4)` validation examples a class.

    Returns:
        The drawn training and validation examples. The former are those of [`sample_few_shot`].
    """
    rng = random.Random(seed)
    drawn_train = _draw(train, num_shots, label_column, when_fewer, rng)
    num_validation = min(num_shots, MAX_VALIDATION_SHOTS)
    drawn_validation = _draw(validation, num_validation, label_column, when_fewer, rng)
    return train.select(drawn_train), validation.select(drawn_validation)


def _draw(dataset, num_shots, label_column, when_fewer, rng: random.Random) -> list[int]:
    """The drawn positions in the data set."""
    if not isinstance(num_shots, int) or num_shots < 1:
        raise ValueError(f"num_shots must be a positive integer, got {num_shots!r}.")
    if when_fewer not in WHEN_FEWER:
        raise ValueError(f"when_fewer must be one of {', '.join(map(repr, WHEN_FEWER))}, got {when_fewer!r}.")
    groups: dict[Hashable, list[int]] = {}
    for position, label in enumerate(read_labels(dataset, label_column)):
        groups.setdefault(label, []).append(position)
    if when_fewer == "error":
        _check_enough(dataset, groups, num_shots, label_column)
    return [position for group in groups.values() for position in _draw_of_class(group, num_shots, when_fewer, rng)]


def _draw_of_class(group: Sequence[int], num_shots: int, when_fewer: str, rng: random.Random) -> Sequence[int]:
    if len(group) >= num_shots:
        return rng.sample(group, num_shots)
    return group if when_fewer == "all" else rng.choices(group, k=num_shots)


def _check_enough(dataset, groups, num_shots, label_column) -> None:
    names = getattr(dataset.features[label_column], "names", None)
    short = {label: len(group) for label, group in groups.items() if len(group) < num_shots}
    if short:
        listed = [f"{names[label] if names else label} {count}" for label, count in short.items()]
        raise ValueError(
            f"{num_shots} examples of every class were asked for, but {len(short)} of {len(groups)} classes have "
            f"fewer ({', '.join(listed[:10])}{', ...' if len(listed) > 10 else ''}). Ask for at most "
            f"{min(short.values())}, or choose with when_fewer to take 'all' there are or to 'repeat' some."
        )


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
