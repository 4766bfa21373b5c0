"""Drawing a few images of every class, as the few-shot literature of CLIP does.

The draw is that of CoOp, which every later method compares itself on: `DatasetBase.generate_fewshot_dataset` of Dassl
(https://github.com/KaiyangZhou/Dassl.pytorch, dassl/data/datasets/base_dataset.py), called as in
https://github.com/KaiyangZhou/CoOp (datasets/oxford_pets.py). For the same items in the same order and the same seed
the same items come out, in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from datasets import Dataset


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


def read_labels(dataset: Dataset, label_column: str) -> list[Hashable]:
    """All values of a column, without decoding the images beside it."""
    if label_column not in dataset.column_names:
        raise ValueError(f"There is no column {label_column!r}; the columns are {', '.join(dataset.column_names)}.")
    column = dataset.select_columns(label_column).with_format("arrow")
    return column[:][label_column].to_pylist()


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
