"""A tuned classifier beside the zero-shot model that it started from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import DataLoader
from transformers import BatchFeature, EvalPrediction, default_data_collator
from transformers.utils import logging

from ..data import class_names_of, with_pixel_values
from ..templates import check_label_names
from .metrics import compute_metrics, softmax


@dataclass(frozen=True)
class Answers:
    """
    What one model answered about N images.

    Attributes:
        logits: (N, C)
        labels: (N,)
    """

    logits: np.ndarray
    labels: np.ndarray

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) class indices."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(N,) probability of the predicted class."""
        return softmax(self.logits.astype(np.float64)).max(axis=1)

    @property
    def is_correct(self) -> np.ndarray:
        """(N,)"""
        return self.predicted == self.labels

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All of [`compute_metrics`]."""
        return compute_metrics(EvalPrediction(predictions=self.logits, label_ids=self.labels))

    def class_accuracy(self, label: int) -> float:
        """Share of the images of a class that are classified correctly; not a number if there are none."""
        of_class = self.is_correct[self.labels == label]
        return float(of_class.mean()) if len(of_class) else float("nan")


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        class_names: of the C classes.
        zero_shot: the answers without the adapter.
        tuned: the answers with it, about the same images.
    """

    class_names: list[str]
    zero_shot: Answers
    tuned: Answers

    @property
    def gained(self) -> np.ndarray:
        """Indices of the images that only the tuned model gets right."""
        return np.flatnonzero(self.tuned.is_correct & ~self.zero_shot.is_correct)

    @property
    def lost(self) -> np.ndarray:
        """Indices of the images that only the zero-shot model got right."""
        return np.flatnonzero(self.zero_shot.is_correct & ~self.tuned.is_correct)


@torch.no_grad()
def compare_with_zero_shot(model, dataset: Dataset, image_processor, batch_size: int = 64) -> Comparison:
    """Classifies images with an adapter and without it.

    Where the adapter leaves the image tower alone, that runs once for both.

    Args:
        model: the `PeftModel` of a classifier.
        dataset: N examples with the columns `image` and `label`, whose classes are the model's.
        image_processor: of the model.
        batch_size: images at a time.

    Raises:
        ValueError: the data set's classes are not the model's.
    """
    class_names = class_names_of(dataset)
    check_label_names(class_names, model.class_names)
    model.eval()
    changes_images = any(isinstance(module, BaseTunerLayer) for module in model.vision_model.modules())
    examples = with_pixel_values(dataset, image_processor)
    tuned, zero_shot, labels = [], [], []
    batches = DataLoader(examples, batch_size=batch_size, collate_fn=default_data_collator)
    for batch in logging.tqdm(batches, desc="Classifying", leave=False):
        labels.append(batch.pop("labels"))
        inputs = BatchFeature(batch).to(model.device, model.dtype)
        if not changes_images:
            inputs = {"image_embeds": model.get_image_features(**inputs).pooler_output}
        tuned.append(model(**inputs).logits.float().cpu())
        with model.disable_adapter():
            zero_shot.append(model(**inputs).logits.float().cpu())
    labels = torch.cat(labels).numpy()
    return Comparison(
        class_names,
        Answers(torch.cat(zero_shot).numpy(), labels),
        Answers(torch.cat(tuned).numpy(), labels),
    )
