"""Split conformal prediction: scores of validation images, and the sets of classes that follow from them.

The score of a class y of an image with the probabilities p says how badly y fits:

- `lac` (https://arxiv.org/abs/1609.00451): `1 - p[y]`. The sets are the smallest on average, and may be empty.
- `aps` (https://arxiv.org/abs/2006.02544): the sum of all probabilities that are larger than `p[y]`. The most probable
  class has the score 0, so the sets are never empty. Randomized, `u * p[y]` is added, where u is drawn evenly from 0
  to 1 for each image: smaller sets, which may be empty and differ from call to call.

The set of a new image holds the classes whose score is at most the k-th smallest of the n validation images, each with
its own label, where `k = ceil((n + 1) * coverage)`. If the new image and the validation images are exchangeable (drawn
from the same distribution, say), the set holds the true class with a probability of at least `coverage`, on average
over validation and new images. The model need not be right for that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real

import numpy as np


METHODS = ("lac", "aps")
MAX_SCORES = 1000  # are stored; of more images every (n / 1000)-th score, rounded so that coverage is never lost
DIGITS = 6  # behind the point, rounded up for the same reason
SHOWN_COVERAGES = (0.8, 0.9, 0.95)  # in reports and cards


@dataclass(frozen=True)
class ConformalScores:
    """
    The scores of validation images, as an adapter holds them.

    Attributes:
        method (`str`):
            `"lac"` or `"aps"`.
        randomized (`bool`):
            Whether `"aps"` draws a number for each image.
        num_images (`int`):
            The number n of validation images.
        scores (`list[float]`):
            At most 1000 scores in ascending order.
        temperature (`float`, *optional*):
            The temperature of the classifier.
        classes (`str`):
            The hash of the class names.
        probe (`list[float]`):
            Logits of the classifier for an image of noise, by which another model is noticed.
    """

    method: str
    randomized: bool
    num_images: int
    scores: list[float]
    temperature: float | None
    classes: str
    probe: list[float]

    @classmethod
    def from_dict(cls, values: Mapping) -> ConformalScores:
        """Reads what [`~ConformalScores.to_dict`] returns, maybe from a file.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            found = cls(**values)
            scores = np.asarray(found.scores, dtype=np.float64)
            is_whole = (
                found.method in METHODS
                and isinstance(found.randomized, bool)
                and isinstance(found.num_images, int)
                and 1 <= len(scores) == min(found.num_images, MAX_SCORES)
                and bool((np.diff(scores) >= 0).all() and scores[0] >= 0 and scores[-1] <= 2)  # also false for NaN
                and len(found.probe) > 0
                and np.isfinite(np.asarray(found.probe, dtype=np.float64)).all()
            )
        except (TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                "conformal_scores are damaged: they are not what ConformalClassifier.fit makes. Fit them again."
            )
        return found

    def to_dict(self) -> dict:
        """Returns the values, as they are written to a file."""
        return asdict(self)

    @property
    def may_be_empty(self) -> bool:
        """Whether a set can hold no class."""
        return self.method == "lac" or self.randomized

    def threshold(self, coverage: float) -> float:
        """Returns the largest score in a set; infinite if there are too few images to promise the coverage.

        Raises:
            ValueError: If the coverage is not a number between 0 and 1.
        """
        check_coverage(coverage)
        rank = num_below(self.num_images, coverage)
        if rank > self.num_images:
            return math.inf
        return self.scores[math.ceil(rank * len(self.scores) / self.num_images) - 1]

    def too_few(self, coverage: float) -> str | None:
        """Says that, and why, a set for this coverage holds all classes; `None` if it need not."""
        if self.threshold(coverage) < math.inf:
            return None
        return (
            f"A coverage of {coverage:g} cannot be promised after {self.num_images} validation images, so every set "
            f"holds all classes; at least {num_needed(coverage)} images are needed."
        )

    def in_set(self, probabilities: np.ndarray, coverage: float, draws: np.ndarray | None = None) -> np.ndarray:
        """Returns which of the classes are in the sets, (B, C), for the probabilities (B, C).

        Args:
            probabilities (`np.ndarray`):
                (B, C), of the classifier with the temperature.
            coverage (`float`):
                The coverage, between 0 and 1.
            draws (`np.ndarray`, *optional*):
                (B,) numbers from 0 to 1, if randomized.
        """
        return class_scores(probabilities, self.method, draws if self.randomized else None) <= self.threshold(coverage)


def check_coverage(coverage: float) -> None:
    """Raises `ValueError` unless a coverage is a number between 0 and 1."""
    is_number = isinstance(coverage, Real) and not isinstance(coverage, bool)
    if not is_number or not 0 < coverage < 1:
        raise ValueError(f"coverage must be a number between 0 and 1, such as 0.9, got {coverage!r}.")


def num_below(num_images: int, coverage: float) -> int:
    """Returns k, the rank of the score that bounds a set."""
    return math.ceil((num_images + 1) * coverage - 1e-9)  # of which 10 * 0.7 must not become 8


def num_needed(coverage: float) -> int:
    """Returns the smallest number of validation images with which a coverage can be promised."""
    n = max(1, math.floor(coverage / (1 - coverage)) - 1)
    while num_below(n, coverage) > n:
        n += 1
    return n


def class_scores(probabilities: np.ndarray, method: str, draws: np.ndarray | None = None) -> np.ndarray:
    """Returns the score of each class (B, C); with `draws` (B,) those of randomized `aps`."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if method == "lac":
        return 1 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    descending = np.take_along_axis(probabilities, order, axis=1)
    before = np.cumsum(descending, axis=1) - descending  # (B, C), the sum of those that are more probable
    before[:, 0] = 0.0
    if draws is not None:
        before = before + draws[:, None] * descending
    scores = np.empty_like(before)
    np.put_along_axis(scores, order, before, axis=1)
    return scores


def kept_scores(scores: np.ndarray) -> list[float]:
    """Returns the scores (N,) as they are stored: in ascending order, at most 1000, rounded up."""
    ascending = np.sort(scores)
    number = min(len(ascending), MAX_SCORES)
    ranks = -(-np.arange(1, number + 1) * len(ascending) // number)
    rounded = np.ceil(np.maximum(ascending[ranks - 1], 0) * 10**DIGITS) / 10**DIGITS
    return [float(score) for score in rounded]


def hash_of_names(class_names: Sequence[str]) -> str:
    """Returns a hash of class names in their order."""
    return hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()[:16]


def coverage_rows(
    scores: ConformalScores, probabilities: np.ndarray, labels: np.ndarray, seed: int = 0
) -> list[tuple[float, float, float, float]]:
    """Returns for some coverages how the sets of test images do, see [`~evaluation.conformal.ConformalClassifier`].

    Args:
        scores (`ConformalScores`):
            The scores.
        probabilities (`np.ndarray`):
            (N, C), of test images.
        labels (`np.ndarray`):
            (N,) class indices.
        seed (`int`, *optional*, defaults to 0):
            The seed of the numbers that are drawn, if randomized.
    """
    draws = np.random.default_rng(seed).random(len(labels))
    rows = []
    for coverage in SHOWN_COVERAGES:
        in_set = scores.in_set(probabilities, coverage, draws)
        sizes = in_set.sum(axis=1)
        covered = in_set[np.arange(len(labels)), labels]
        rows.append((coverage, float(covered.mean()), float(sizes.mean()), float((sizes == 0).mean())))
    return rows
