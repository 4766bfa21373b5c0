"""Predictions of a classifier, and the comparison of a trained adapter with the zero-shot model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, BatchFeature, EvalPrediction, default_data_collator
from transformers.utils import logging

from ..data import class_names_of, with_pixel_values
from ..modeling import classifier_in
from ..templates import check_label_names
from ..towers import eval_mode, execution_device, has_adapters, image_side
from .conformal_scores import ConformalScores, coverage_rows, hash_of_names
from .metrics import compute_metrics, softmax


ECE = "expected_calibration_error"


@dataclass
class Predictions:
    """
    The predictions of a classifier for N images.

    Attributes:
        labels (`np.ndarray`):
            The (N,) indices of the true classes.
        predicted (`np.ndarray`):
            The (N,) indices of the predicted classes.
        confidence (`np.ndarray`):
            The (N,) probabilities of the predicted classes.
        class_names (`Sequence[str]`, *optional*):
            The names of the C classes.
    """

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    class_names: Sequence[str] = ()

    @property
    def is_correct(self) -> np.ndarray:
        """A (N,) boolean array that is true where the prediction is correct."""
        return self.predicted == self.labels


class Answers(Predictions):
    """
    Predictions together with the logits they are computed from.

    Args:
        logits (`np.ndarray`):
            The (N, C) logits.
        labels (`np.ndarray`):
            The (N,) indices of the true classes.
        class_names (`Sequence[str]`, *optional*):
            The names of the C classes.
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str] = ()) -> None:
        confidence = softmax(logits.astype(np.float64)).max(axis=1)
        super().__init__(labels, logits.argmax(axis=1), confidence, class_names)
        self.logits = logits

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics of [`compute_metrics`]."""
        return compute_metrics(EvalPrediction(predictions=self.logits, label_ids=self.labels))

    def class_accuracy(self, label: int) -> float:
        """Returns the accuracy on the images of one class, or NaN if the class has no images."""
        return self._share_of_correct(self.labels == label)

    def class_precision(self, label: int) -> float:
        """Returns the share of correct ones among the predictions of one class, or NaN if it is never predicted."""
        return self._share_of_correct(self.predicted == label)

    def _share_of_correct(self, of_class: np.ndarray) -> float:
        is_correct = self.is_correct[of_class]
        return float(is_correct.mean()) if len(is_correct) else float("nan")


@dataclass(frozen=True)
class Comparison:
    """
    The predictions with and without an adapter for the same images.

    Attributes:
        class_names (`list[str]`):
            The names of the C classes.
        zero_shot (`Answers`):
            The predictions without the adapter.
        tuned (`Answers`):
            The predictions with the adapter.
        temperature (`float`, *optional*):
            The temperature of the adapter, by which its logits are divided.
    """

    class_names: list[str]
    zero_shot: Answers
    tuned: Answers
    temperature: float | None = None

    @cached_property
    def uncalibrated(self) -> Answers | None:
        """The predictions with the adapter without its temperature; `None` if it has none."""
        if self.temperature is None:
            return None
        return Answers(self.tuned.logits * self.temperature, self.tuned.labels, self.tuned.class_names)

    def calibration_errors(self) -> tuple[float, float] | None:
        """Returns the expected calibration error without and with the temperature; `None` if there is none."""
        if self.uncalibrated is None:
            return None
        without, calibrated = (answers.metrics[ECE] for answers in (self.uncalibrated, self.tuned))
        return without, calibrated

    def coverage_rows(self, conformal_scores: dict | None) -> list[tuple[float, float, float, float]]:
        """Returns how sets of classes do, see [`~evaluation.conformal.ConformalClassifier.evaluate`].

        Args:
            conformal_scores (`dict`, *optional*):
                The scores of the adapter. Without them, and with those of other classes or of another temperature, the
                list is empty.
        """
        if conformal_scores is None:
            return []
        scores = ConformalScores.from_dict(conformal_scores)
        fits = (scores.temperature or 1.0) == (self.temperature or 1.0)
        if not fits or scores.classes != hash_of_names(self.class_names):
            return []
        return coverage_rows(scores, softmax(self.tuned.logits.astype(np.float64)), self.tuned.labels)

    @property
    def gained(self) -> np.ndarray:
        """The indices of the images that only the tuned model classifies correctly."""
        return np.flatnonzero(self.tuned.is_correct & ~self.zero_shot.is_correct)

    @property
    def lost(self) -> np.ndarray:
        """The indices of the images that only the zero-shot model classifies correctly."""
        return np.flatnonzero(self.zero_shot.is_correct & ~self.tuned.is_correct)

    @property
    def wrong(self) -> np.ndarray:
        """The indices of the images that the tuned model classifies wrongly, those of the highest confidence first."""
        indices = np.flatnonzero(~self.tuned.is_correct)
        return indices[np.argsort(-self.tuned.confidence[indices], kind="stable")]

    def confused_pairs(self) -> list[tuple[str, str, int, np.ndarray]]:
        """Returns the pairs of classes that the tuned model confuses, the most frequent first.

        Returns:
            `list[tuple]`: The true class, the predicted class, the number of images of the true class, and the indices
            of those of them that are predicted to be of the other class, those of the highest confidence first.
        """
        pairs: dict[tuple[int, int], list[int]] = {}
        for index in self.wrong:
            pairs.setdefault((int(self.tuned.labels[index]), int(self.tuned.predicted[index])), []).append(index)
        by_number = sorted(pairs.items(), key=lambda pair: -len(pair[1]))
        names, counts = self.class_names, np.bincount(self.tuned.labels, minlength=len(self.class_names))
        return [
            (names[true], names[predicted], int(counts[true]), np.array(indices))
            for (true, predicted), indices in by_number
        ]

    def metric_rows(self) -> list[tuple[str, float, float]]:
        """Returns the name of each metric, its zero-shot value and its tuned value."""
        return [(name, self.zero_shot.metrics[name], value) for name, value in self.tuned.metrics.items()]

    def class_rows(self) -> list[tuple[str, int, float, float, float]]:
        """Returns the name, number of images, zero-shot recall, tuned recall and tuned precision of each class.

        The recall is the accuracy on the images of the class. The precision is the share of images of the class among
        those that are predicted to be of it, NaN if there are none. Classes without images are left out.
        """
        rows = []
        for label, name in enumerate(self.class_names):
            count = int(np.sum(self.tuned.labels == label))
            if count:
                recalls = self.zero_shot.class_accuracy(label), self.tuned.class_accuracy(label)
                rows.append((name, count, *recalls, self.tuned.class_precision(label)))
        return rows


@torch.no_grad()
def compare_with_zero_shot(
    model: PeftModel, dataset: Dataset, image_processor: BaseImageProcessor, batch_size: int = 64
) -> Comparison:
    """Classifies images with an adapter and without it.

    The image tower runs only once per image if the adapter does not change it.

    Args:
        model (`PeftModel`):
            A classifier with an adapter.
        dataset (`Dataset`):
            Images in the column `image` and labels in the column `label`, with the classes of the model.
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        batch_size (`int`, *optional*, defaults to 64):
            The number of images per batch.

    Raises:
        ValueError: If the classes of the data set are not those of the model.
    """
    class_names = class_names_of(dataset)
    check_label_names(class_names, model.class_names)
    changes_images = has_adapters(image_side(model))
    examples = with_pixel_values(dataset, image_processor)
    tuned, zero_shot, labels = [], [], []
    batches = DataLoader(examples, batch_size=batch_size, collate_fn=default_data_collator)
    with eval_mode(model):
        for batch in logging.tqdm(batches, desc="Classifying", leave=False):
            labels.append(batch.pop("labels"))
            inputs = BatchFeature(batch).to(execution_device(model), model.dtype)
            if not changes_images:
                inputs = {"image_embeds": model.get_image_features(**inputs).pooler_output}
            tuned.append(model(**inputs).logits.float().cpu())
            with model.disable_adapter():
                zero_shot.append(model(**inputs).logits.float().cpu())
    labels = torch.cat(labels).numpy()
    zero_shot, tuned = (Answers(torch.cat(logits).numpy(), labels) for logits in (zero_shot, tuned))
    return Comparison(class_names, zero_shot, tuned, classifier_in(model, "comparing").temperature)
