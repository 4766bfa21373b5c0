"""Dividing a data set."""

from __future__ import annotations

from datasets import Dataset

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
