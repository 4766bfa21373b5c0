"""One number for accuracy on base and on new classes."""

from __future__ import annotations


def harmonic_mean(base: float, new: float) -> float:
    """H of base-to-new generalisation: `2 base new / (base + new)`, 0 if both are 0.

    As the field reports it (https://arxiv.org/abs/2203.05557): over several data sets, take the harmonic mean of the
    two averages, not the average of harmonic means.

    Raises:
        ValueError: a negative value.
    """
    if base < 0 or new < 0:
        raise ValueError(f"Accuracies are 0 or more, got {base} and {new}.")
    return 2 * base * new / (base + new) if base + new else 0.0
