"""The teacher of a distillation, `--teacher`, of the command `train`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import BaseImageProcessor

from .. import AutoModelForPromptClassification, DistillationTrainer, PromptClassificationMixin
from ..data import cache_teacher_logits, with_pixel_values
from ..training.recipes import TRAINERS
from ..tuner.files import holds_model
from ..tuner.hub import load_image_processor
from .adapters import find_adapter


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """
    A teacher of the classes of the data set.

    Attributes:
        model (`PromptClassificationMixin`):
            The classifier.
        image_processor (`BaseImageProcessor`):
            Its image processor.
        width (`int`):
            The width of its class embeddings.
    """

    model: PromptClassificationMixin
    image_processor: BaseImageProcessor
    width: int

    def training_images(self, images: Dataset, image_processor: BaseImageProcessor, augment: bool) -> Dataset:
        """Returns the images for a training, without their labels, and with what the teacher says of them or sees."""
        if augment:
            return with_pixel_values(
                images, image_processor, augment=True, unlabeled=True, teacher_processor=self.image_processor
            )
        return with_pixel_values(
            cache_teacher_logits(images, self.model, self.image_processor), image_processor, unlabeled=True
        )


def check_teacher(method: str | None, teacher: str | None) -> None:
    """Raises `ValueError` unless a teacher is given for a method that learns from one, and for no other."""
    needs_one = TRAINERS.get(method) is DistillationTrainer
    if needs_one and teacher is None:
        raise ValueError(
            f"--method {method} learns from a teacher instead of labels; name one with --teacher: a larger CLIP, or "
            "an adapter, as a folder or Hub id."
        )
    if teacher is not None and not needs_one:
        raise ValueError(f"--teacher {teacher!r} is for --method promptkd only, got --method {method}.")


def load_teacher(name: str, class_names: Sequence[str], template: str, **hub) -> Teacher:
    """Loads the classifier, or adapter, and gives it the classes of the data set."""
    if not holds_model(name):
        name = find_adapter(name) if os.path.exists(name) else name
    model = AutoModelForPromptClassification.from_pretrained(name, **hub)
    own = model.class_names
    if own is None:
        model.set_prompt_template(template)
    elif list(own) != list(class_names):
        logger.warning(
            "The teacher %s has other classes (%s, ...); here it answers for those of the data set.", name, own[0]
        )
    model.set_class_names(class_names)
    with torch.no_grad():
        width = model.eval().get_class_embeds().shape[-1]
    return Teacher(model, load_image_processor(model), width)
