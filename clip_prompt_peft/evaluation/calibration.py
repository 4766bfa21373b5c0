"""Temperature scaling: the number that makes the probabilities of a classifier those of its being right."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, BatchFeature, default_data_collator

from ..data import with_pixel_values
from ..data.columns import IMAGE, check_label_order
from ..labels import IGNORED_LABEL, check_indices, check_shape
from ..modeling import PromptClassificationMixin, classifier_in
from ..towers import eval_mode, execution_device
from ..tuner.base_config import MULTI_LABEL
from ..tuner.hub import load_image_processor
from .metrics import calibration_error, softmax


logger = logging.getLogger(__name__)

BOUNDS = (0.01, 100.0)  # of a fitted temperature
FEW_IMAGES = 50
MAX_STEPS, TOLERANCE = 200, 1e-12
INPUTS = ("pixel_values", "image_embeds")  # either of them in a row says that it is ready for the model


@dataclass(frozen=True)
class TemperatureFit:
    """
    A temperature, and what it does on the images that it was fitted on.

    Attributes:
        temperature (`float`):
            The number T by which logits are divided.
        standard_error (`float`):
            How far T may be off because there are only so many images: its standard error by the curvature of the
            likelihood. Infinite where the likelihood is flat.
        num_images (`int`):
            The number of images.
        is_at_bound (`bool`):
            Whether T is at an end of the range from 0.01 to 100, beyond which the likelihood still grows.
        nll_before, nll_after (`float`):
            The mean negative log-likelihood of the labels without and with the temperature.
        ece_before, ece_after (`float`):
            The expected calibration error (15 bins) without and with it. For images with several labels, each class of
            each image counts as one prediction.
    """

    temperature: float
    standard_error: float
    num_images: int
    is_at_bound: bool
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def fit_temperature(
    model: PromptClassificationMixin | PeftModel,
    dataset: Any = None,
    image_processor: BaseImageProcessor | None = None,
    batch_size: int = 64,
    *,
    logits: Any = None,
    labels: Any = None,
) -> TemperatureFit:
    """
    Finds the temperature T with which the labels of validation images are most likely, and sets it.

    The logits are then divided by T in evaluation: those of the adapter in effect, with which T is saved, or those of
    the classifier without adapters, with whose config it is saved. Predictions stay the same, and probabilities become
    those of being right. T is not used in training; fit it again after further training, and with images that were
    neither trained nor tested on. A logit bias (SigLIP) is divided, too, which matters for several labels per image
    only, where T maximizes the likelihood of each label by itself.

    Args:
        model (`PromptClassificationMixin` or `PeftModel`):
            A classifier, with or without adapters.
        dataset (`datasets.Dataset`, *optional*):
            Validation images: the columns `image` and `label`, or rows as [`cache_image_embeds`] and
            [`with_pixel_values`] make them.
        image_processor (`BaseImageProcessor`, *optional*):
            The image processor for images. By default, it is loaded from where the base model was loaded.
        batch_size (`int`, *optional*, defaults to 64):
            The number of images per batch.
        logits, labels (`torch.Tensor` or `np.ndarray`, *optional*):
            Instead of a data set: the (N, C) logits that the model gives in evaluation, and the (N,) labels, or (N, C)
            zeros and ones with several labels per image. Images with the label -100 are left out.

    Returns:
        `TemperatureFit`: The temperature, with likelihood and calibration error before and after.

    Raises:
        TypeError: If the model is not a classifier.
        ValueError: If there are no labeled images, labels are out of range or in another order than the model's, or
            logits have NaN.

    Example:

    ```py
    >>> fit = fit_temperature(model, validation)
    >>> print(f"{fit.temperature:.2f}: calibration error {fit.ece_before:.1%} -> {fit.ece_after:.1%}")
    ```
    """
    classifier = classifier_in(model, "fit_temperature")
    is_multi_label = classifier.config.problem_type == MULTI_LABEL
    logits, labels = validation_logits(model, dataset, image_processor, batch_size, logits=logits, labels=labels)
    if classifier.temperature is not None:
        logits = logits * classifier.temperature
    fit = best_temperature(logits, labels, is_multi_label)
    classifier.set_temperature(fit.temperature)
    if fit.is_at_bound:
        logger.warning(
            "The temperature %g is the end of its range, beyond which the labels would be still more likely: %s.",
            fit.temperature,
            "all validation images are classified correctly, so they do not say how often the model is wrong; more "
            "images do"
            if fit.temperature < 1
            else "the validation images are classified no better than by chance; check their labels",
        )
    elif fit.num_images < FEW_IMAGES:
        logger.warning(
            "The temperature %.3g was fitted on %d images only, and may be off by about %.2g (its standard error); "
            "%d images or more say it better.",
            fit.temperature,
            fit.num_images,
            fit.standard_error,
            FEW_IMAGES,
        )
    return fit


def validation_logits(
    model, dataset=None, image_processor=None, batch_size: int = 64, *, logits=None, labels=None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the checked logits (N, C), in float64, and the labels, of a data set or as they are given.

    Images with the label -100 are left out.
    """
    classifier = classifier_in(model, "calibrating")
    if (dataset is None) == (logits is None) or (logits is None) != (labels is None):
        raise ValueError("Give either a dataset of validation images, or their logits and labels.")
    if classifier.class_names is None:
        raise ValueError("The classifier has no class names; call set_class_names([...]) first.")
    if logits is None:
        logits, labels = _logits_of(model, dataset, image_processor, batch_size)
    logits, labels = torch.as_tensor(logits).detach().double().cpu(), torch.as_tensor(labels).detach().cpu()
    names, problem_type = classifier.class_names, classifier.config.problem_type
    if logits.ndim != 2 or logits.shape[1] != len(names):
        raise ValueError(
            f"logits must be (N, {len(names)}), one for each class of the model, got the shape {tuple(logits.shape)}."
        )
    check_shape(labels, names, problem_type)
    if len(labels) != len(logits):
        raise ValueError(f"Expected one label per image, got {len(labels)} labels for {len(logits)} images.")
    if problem_type == MULTI_LABEL:
        bad = labels[(labels != 0) & (labels != 1)]
        if bad.numel():
            raise ValueError(f"Labels of images with several classes must be zeros and ones, got {bad[0].item()}.")
    else:
        check_indices(labels, names)
        labels = labels.long()
        is_labeled = labels != IGNORED_LABEL
        logits, labels = logits[is_labeled], labels[is_labeled]
    if not len(logits):
        raise ValueError(
            "There are no validation images with a label, which calibration needs; give images that were neither "
            "trained nor tested on."
        )
    is_broken = ~torch.isfinite(logits).all(dim=1)
    if is_broken.any():
        raise ValueError(
            f"The logits of {int(is_broken.sum())} of {len(logits)} validation images have NaN or Inf, such as those "
            f"of image {int(is_broken.int().argmax())}: the training may have diverged, or the dtype is too small."
        )
    return logits.numpy(), labels.numpy()


@torch.no_grad()
def _logits_of(model, dataset, image_processor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (N, C) and labels of a data set."""
    classifier = classifier_in(model, "calibrating")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("There are no validation images: the data set is empty.")
    if not isinstance(first, Mapping):
        hint = f" of {list(dataset)}; name one of them" if isinstance(dataset, Mapping) else ""
        raise ValueError(
            f"The validation images must be a data set, whose rows have names, got {type(dataset).__name__}{hint}."
        )
    label_names = getattr(dataset, "features", None)  # of `datasets`
    if not any(name in first for name in INPUTS):
        if IMAGE not in first:
            raise ValueError(
                f"The validation images must be in the column {IMAGE!r}, or be prepared as {' or '.join(INPUTS)}; the "
                f"data set has {sorted(first)}."
            )
        if label_names is not None:
            check_label_order(dataset, classifier.class_names)
        dataset = with_pixel_values(dataset, image_processor or load_image_processor(classifier))
    elif label_names is not None:
        check_label_order(dataset, classifier.class_names, "labels")
    logits, labels = [], []
    with eval_mode(model):
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator):
            if "labels" not in batch:
                raise ValueError(f"The validation images have no labels, only {sorted(batch)}.")
            labels.append(batch.pop("labels").cpu())
            inputs = BatchFeature(batch).to(execution_device(classifier), classifier.dtype)
            logits.append(model(**inputs).logits.double().cpu())
    return torch.cat(logits), torch.cat(labels)


def best_temperature(logits: np.ndarray, labels: np.ndarray, is_multi_label: bool = False) -> TemperatureFit:
    """
    Finds the temperature with which labels are most likely.

    The negative log-likelihood is convex in 1 / T, so Newton's method in a bracket finds its only minimum.

    Args:
        logits (`np.ndarray`):
            (N, C), without NaN.
        labels (`np.ndarray`):
            (N,) class indices, or (N, C) zeros and ones.
        is_multi_label (`bool`, *optional*, defaults to `False`):
            Whether images have several labels.
    """
    logits = logits.astype(np.float64)
    likelihood = _MultiLabel(logits, labels) if is_multi_label else _SingleLabel(logits, labels)
    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]  # of the factor 1 / T
    factor, is_at_bound = 1.0, False
    if likelihood.slope(low)[0] >= 0 or likelihood.slope(high)[0] <= 0:
        factor, is_at_bound = (low if likelihood.slope(low)[0] >= 0 else high), True
    else:
        for _ in range(MAX_STEPS):
            slope, curvature = likelihood.slope(factor)
            low, high = (factor, high) if slope < 0 else (low, factor)
            step = factor - slope / curvature if curvature > 0 else 0.0
            following = step if low < step < high else math.sqrt(low * high)
            if abs(following - factor) <= TOLERANCE * factor:
                break
            factor = following
    information = len(logits) * likelihood.slope(factor)[1]
    error = 1 / (factor * math.sqrt(information)) if information > 0 else math.inf  # of log T, as of log (1 / T)
    return TemperatureFit(
        temperature=1 / factor,
        standard_error=error / factor,
        num_images=len(logits),
        is_at_bound=is_at_bound,
        nll_before=likelihood.value(1.0),
        nll_after=likelihood.value(factor),
        ece_before=likelihood.calibration_error(1.0),
        ece_after=likelihood.calibration_error(factor),
    )


class _SingleLabel:
    """The mean negative log-likelihood of one label for each image, as a function of the factor of all logits."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self.logits, self.labels = logits - logits.max(axis=1, keepdims=True), labels
        self.of_label = self.logits[np.arange(len(labels)), labels]

    def value(self, factor: float) -> float:
        return float(np.mean(np.log(np.exp(factor * self.logits).sum(axis=1)) - factor * self.of_label))

    def slope(self, factor: float) -> tuple[float, float]:
        """Returns the first and the second derivative."""
        probabilities = softmax(factor * self.logits)
        mean = (probabilities * self.logits).sum(axis=1)
        variance = (probabilities * self.logits**2).sum(axis=1) - mean**2
        return float(np.mean(mean - self.of_label)), float(np.mean(variance))

    def calibration_error(self, factor: float) -> float:
        probabilities = softmax(factor * self.logits)
        return calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == self.labels)


class _MultiLabel:
    """The same for several labels per image: the sum of the likelihoods of all classes."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self.logits, self.labels = logits, labels.astype(np.float64)

    def value(self, factor: float) -> float:
        logits = factor * self.logits
        return float(np.mean((np.logaddexp(0, logits) - logits * self.labels).sum(axis=1)))

    def slope(self, factor: float) -> tuple[float, float]:
        probabilities = _sigmoid(factor * self.logits)
        first = (self.logits * (probabilities - self.labels)).sum(axis=1)
        second = (self.logits**2 * probabilities * (1 - probabilities)).sum(axis=1)
        return float(np.mean(first)), float(np.mean(second))

    def calibration_error(self, factor: float) -> float:
        return calibration_error(_sigmoid(factor * self.logits).ravel(), self.labels.ravel() == 1)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
