"""Sets of classes that hold the true one with a chosen probability, for a classifier with or without an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from ..image_files import decode_image, process_images
from ..modeling import PromptClassificationMixin, classifier_in
from ..text.cache import WeightsState
from ..towers import eval_mode, execution_device, find_towers, takes_patches
from ..tuner.base_config import MULTI_LABEL
from ..tuner.hub import load_image_processor
from .calibration import validation_logits
from .conformal_scores import (
    METHODS,
    ConformalScores,
    class_scores,
    coverage_rows,
    hash_of_names,
    kept_scores,
)
from .metrics import softmax


NUM_PROBED = 32  # logits
ALLOWED = {torch.float32: 5e-3, torch.float64: 5e-3}  # difference of probed logits, as a share of the largest
ALLOWED_IN_HALF_PRECISION = 5e-2


@dataclass(frozen=True)
class ConformalSets:
    """
    The sets of classes of B images.

    Attributes:
        coverage (`float`):
            The probability that a set holds the true class.
        in_set (`np.ndarray`):
            (B, C), whether each class is in the set of each image.
        probabilities (`np.ndarray`):
            (B, C), of the classifier.
        class_names (`list[str]`):
            The C classes.
    """

    coverage: float
    in_set: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]

    @property
    def names(self) -> list[list[str]]:
        """The class names in each set, the most probable first."""
        return [[self.class_names[label] for label in labels] for labels in self.labels]

    @property
    def labels(self) -> list[list[int]]:
        """The class indices in each set, the most probable first."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        return [[int(label) for label in row if in_row[label]] for row, in_row in zip(order, self.in_set)]

    @property
    def sizes(self) -> np.ndarray:
        """(B,), the number of classes in each set."""
        return self.in_set.sum(axis=1)

    def is_unsure(self, max_size: int = 1) -> np.ndarray:
        """Returns (B,), whether the answer should be "I don't know": the set is empty or of more than `max_size`."""
        return (self.sizes == 0) | (self.sizes > max_size)


class ConformalClassifier:
    """
    A classifier that answers with sets of classes, by split conformal prediction.

    The sets hold the true class with a probability of at least the coverage, if new images and validation images are
    exchangeable: of the same source, say, and not one in another style. It holds on average over images, not for each
    class. See [`conformal_scores`](#clip_prompt_peft.evaluation.conformal_scores.ConformalScores) for the methods.

    Args:
        model (`PromptClassificationMixin` or `PeftModel`):
            A classifier whose adapter in effect (or which itself, without one) has scores, since
            [`~ConformalClassifier.fit`] was called on it before or before it was saved.
        image_processor (`BaseImageProcessor`, *optional*):
            The image processor. By default, it is loaded from where the base model was loaded.
        seed (`int`, *optional*, defaults to 0):
            The seed of the numbers that randomized sets draw.

    Raises:
        TypeError: If the model is not a classifier.
        ValueError: If it has no scores, or those of other classes, of another temperature or of another model.

    Example:

    ```py
    >>> conformal = ConformalClassifier.fit(model, validation)
    >>> model.save_pretrained("pets-prompts")  # with the scores
    >>> ConformalClassifier(model).predict_set(images, coverage=0.9).names
    [['cat'], ['cat', 'lynx']]
    ```
    """

    def __init__(
        self,
        model: PromptClassificationMixin | PeftModel,
        image_processor: BaseImageProcessor | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.classifier = model, classifier_in(model, "ConformalClassifier")
        self._image_processor = image_processor
        self._random = np.random.default_rng(seed)
        self._checked: tuple | None = None
        if self.classifier.conformal_scores is None:
            raise ValueError(
                "The model has no scores of validation images, which sets of classes need; call "
                "ConformalClassifier.fit(model, validation_images), or train with --calibrate true."
            )
        self.check()

    @classmethod
    def fit(
        cls,
        model: PromptClassificationMixin | PeftModel,
        dataset: Any = None,
        image_processor: BaseImageProcessor | None = None,
        method: str = "aps",
        randomized: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        *,
        logits: Any = None,
        labels: Any = None,
    ) -> ConformalClassifier:
        """Computes the scores of validation images, which are kept, and saved, with the adapter in effect.

        Fit a temperature first, and on other images: strictly, the scores must not depend on what they are computed
        from. Any coverage can be asked for later.

        Args:
            model (`PromptClassificationMixin` or `PeftModel`):
                A classifier.
            dataset, image_processor, batch_size, logits, labels:
                The validation images, as in [`~evaluation.calibration.fit_temperature`].
            method (`str`, *optional*, defaults to `"aps"`):
                `"aps"`: sets that are never empty, larger for difficult images. `"lac"`: the smallest sets on average.
            randomized (`bool`, *optional*, defaults to `False`):
                Whether `"aps"` draws a number for each image, for smaller sets that can be empty.
            seed (`int`, *optional*, defaults to 0):
                The seed of these numbers.

        Raises:
            TypeError: If the model is not a classifier.
            ValueError: If the method is unknown, images can have several labels, or the validation images are not
                valid, see [`~evaluation.calibration.fit_temperature`].
        """
        classifier = classifier_in(model, "ConformalClassifier")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
        if not isinstance(randomized, bool) or (randomized and method != "aps"):
            raise ValueError(f"randomized={randomized!r} must be True or False, and True goes with method='aps' only.")
        if classifier.config.problem_type == MULTI_LABEL:
            raise ValueError("Sets of classes are for images of one class; this classifier has several per image.")
        logits, labels = validation_logits(model, dataset, image_processor, batch_size, logits=logits, labels=labels)
        draws = np.random.default_rng(seed).random(len(labels)) if randomized else None
        of_label = class_scores(softmax(logits), method, draws)[np.arange(len(labels)), labels]
        scores = ConformalScores(
            method=method,
            randomized=randomized,
            num_images=len(labels),
            scores=kept_scores(of_label),
            temperature=classifier.temperature,
            classes=hash_of_names(classifier.class_names or ()),
            probe=[round(value, 4) for value in _probe(model, classifier).tolist()],
        )
        classifier.set_conformal_scores(scores.to_dict())
        return cls(model, image_processor, seed + 1)

    @property
    def scores(self) -> ConformalScores:
        """The scores of the adapter in effect, or of the classifier.

        Raises:
            ValueError: If there are none, or they are damaged.
        """
        scores = self.classifier.conformal_scores
        if scores is None:
            raise ValueError(
                "The adapter that is in effect now has no scores of validation images; activate the one that was "
                "fitted, or call ConformalClassifier.fit again."
            )
        return ConformalScores.from_dict(scores)

    @torch.no_grad()
    def predict_set(
        self, images: Sequence[Any] | None = None, coverage: float = 0.9, **inputs: torch.Tensor
    ) -> ConformalSets:
        """Returns the set of classes of each image.

        Args:
            images (`Sequence`, *optional*):
                Images as [`decode_image`] takes them: of Pillow, paths, bytes, arrays.
            coverage (`float`, *optional*, defaults to 0.9):
                The probability with which a set holds the true class, between 0 and 1.
            inputs:
                Instead of images, the inputs of the model: `pixel_values` or `image_embeds`.

        Raises:
            ValueError: If the coverage is not between 0 and 1, or the model is not the one that was calibrated any
                more: other classes, another adapter or another temperature.
        """
        scores = self.check()
        if (told := scores.too_few(coverage)) is not None:
            warnings.warn(told, UserWarning, stacklevel=3)
        if (images is None) == (not inputs):
            raise ValueError("Give either images, or the inputs of the model: pixel_values or image_embeds.")
        if images is not None:
            if isinstance(images, (str, Image.Image)):
                raise ValueError("images must be a list of images; write [image] for one.")
            if self._image_processor is None:
                self._image_processor = load_image_processor(self.classifier)
            inputs = process_images(self._image_processor, [decode_image(image) for image in images])
        prepared = BatchFeature(dict(inputs)).to(execution_device(self.classifier), self.classifier.dtype)
        with eval_mode(self.model):
            logits = self.model(**prepared).logits
        return self.sets_of(logits, coverage)

    def sets_of(self, logits: torch.Tensor | np.ndarray, coverage: float = 0.9) -> ConformalSets:
        """Returns the sets that follow from logits (B, C), which the model has given in evaluation."""
        scores = self.scores
        probabilities = softmax(torch.as_tensor(logits).detach().double().cpu().numpy())
        draws = self._random.random(len(probabilities)) if scores.randomized else None
        in_set = scores.in_set(probabilities, coverage, draws)
        return ConformalSets(coverage, in_set, probabilities, list(self.classifier.class_names or ()))

    def evaluate(
        self,
        dataset: Any = None,
        image_processor: BaseImageProcessor | None = None,
        batch_size: int = 64,
        *,
        logits: Any = None,
        labels: Any = None,
    ) -> list[tuple[float, float, float, float]]:
        """Returns how the sets do on test images, for a coverage of 0.8, 0.9 and 0.95.

        Args:
            dataset, image_processor, batch_size, logits, labels:
                The test images, as in [`~evaluation.calibration.fit_temperature`].

        Returns:
            `list[tuple]`: The coverage asked for, the share of sets that hold the true class, the mean size of the
            sets, and the share of empty sets.
        """
        scores = self.check()
        processor = image_processor or self._image_processor
        logits, labels = validation_logits(self.model, dataset, processor, batch_size, logits=logits, labels=labels)
        return coverage_rows(scores, softmax(logits), labels)

    def check(self) -> ConformalScores:
        """Returns the scores, after comparing the model with the one that they were computed with.

        Raises:
            ValueError: If it has other classes, another temperature or another adapter now.
        """
        scores, classifier = self.scores, self.classifier
        if classifier.config.problem_type == MULTI_LABEL:
            raise ValueError("Sets of classes are for images of one class; this classifier has several per image.")
        if hash_of_names(classifier.class_names or ()) != scores.classes:
            raise ValueError(
                "The sets were calibrated for other class names, or another order of them, than the model has now; "
                "call ConformalClassifier.fit with validation images of these classes."
            )
        now, then = classifier.temperature or 1.0, scores.temperature or 1.0
        if abs(now - then) > 1e-6 * then:
            raise ValueError(
                f"The sets were calibrated with the temperature {then:.4g}, and the model has {now:.4g} now; call "
                "ConformalClassifier.fit again, or set_temperature to the former one."
            )
        texts = (classifier.prompt_template, id(classifier._fixed_class_embeds))
        key = (scores, texts, WeightsState((classifier,)))
        if self._checked == key:  # the probe costs a pass of the image tower
            return scores
        probe, expected = _probe(self.model, classifier), np.asarray(scores.probe)
        if len(probe) != len(expected):
            raise ValueError("The sets were calibrated for another number of classes; call ConformalClassifier.fit.")
        allowed = ALLOWED.get(classifier.dtype, ALLOWED_IN_HALF_PRECISION) * max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(probe - expected).max())
        if not difference <= allowed:  # also for NaN
            raise ValueError(
                "The sets were calibrated for another model: another adapter, further training, or another base "
                f"model. For an image of noise its logits differ by up to {difference:.2g}, where {allowed:.2g} is "
                "allowed for rounding. Call ConformalClassifier.fit with this model."
            )
        self._checked = key
        return scores


@torch.no_grad()
def _probe(model, classifier: PromptClassificationMixin) -> np.ndarray:
    """Returns the first logits for an image of noise, which is always the same."""
    noise = torch.Generator().manual_seed(0)
    vision = classifier.config.vision_config
    towers = find_towers(classifier, "vision")
    if any(takes_patches(classifier.get_submodule(tower.embeddings_key)) for tower in towers):
        rows, width = 4, vision.num_channels * vision.patch_size**2
        inputs = {
            "pixel_values": torch.randn((1, rows * rows, width), generator=noise),
            "pixel_attention_mask": torch.ones((1, rows * rows), dtype=torch.int32),
            "spatial_shapes": torch.tensor([[rows, rows]]),
        }
    else:
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        inputs = {"pixel_values": torch.randn(shape, generator=noise)}
    prepared = BatchFeature(inputs).to(execution_device(classifier), classifier.dtype)
    with eval_mode(model):
        logits = model(**prepared).logits
    return logits[0, :NUM_PROBED].double().cpu().numpy()
