"""The logits of a teacher for the images of a dataset, computed once (PromptKD)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset, Value
from datasets import Sequence as SequenceFeature
from torch import nn
from transformers import BaseImageProcessor

from ..loss import TEACHER_LOGITS
from ..towers import eval_mode, execution_device
from .columns import LABEL, check_is_no_stream
from .image_embeds import cache_image_embeds


BATCH_OF_EMBEDS = 1024


def cache_teacher_logits(
    dataset: Dataset,
    teacher: nn.Module,
    image_processor: BaseImageProcessor,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Dataset:
    """
    Adds the column `teacher_logits`, so that the teacher need not see the images again in each epoch.

    The image embeddings of the teacher are computed and kept by [`cache_image_embeds`], and its logits are computed of
    them. They are those of the images as the processor prepares them, so they cannot be used with random crops.

    Args:
        dataset (`datasets.Dataset`):
            A dataset of N examples with the column `image`. Labels are not needed, and not used.
        teacher (`PromptClassificationMixin` or `PeftModel`):
            The classifier of the C classes that the student is to tell apart, in the same order.
        image_processor (`BaseImageProcessor`):
            The image processor of the teacher.
        batch_size (`int`, *optional*, defaults to 64):
            The number of images per forward pass.
        num_workers (`int`, *optional*, defaults to 0):
            The number of processes that decode images.

    Returns:
        `datasets.Dataset`: The dataset with `teacher_logits` (N, C) in float32.

    Raises:
        TypeError: If the dataset is a stream.
        UnreadableImageError: If an image cannot be read.

    Example:

    ```py
    >>> images = cache_teacher_logits(images, teacher, teacher_processor)
    >>> train_set = with_pixel_values(images, image_processor, unlabeled=True)
    >>> DistillationTrainer(model, args, teacher=teacher, train_dataset=train_set).train()
    ```
    """
    check_is_no_stream(dataset)
    others = [name for name in (LABEL, TEACHER_LOGITS) if name in dataset.column_names]
    unlabeled = dataset.remove_columns(others).add_column(LABEL, np.full(len(dataset), -100))
    settings = {"batch_size": batch_size, "num_workers": num_workers, "description": "Embedding images (teacher)"}
    with _frozen(teacher):  # it may have just been trained
        embedded = cache_image_embeds(unlabeled, teacher, image_processor, **settings)
    batches = [_logits(teacher, batch["image_embeds"]) for batch in embedded.iter(BATCH_OF_EMBEDS)]
    logits = torch.cat(batches).numpy()  # (N, C)
    if TEACHER_LOGITS in others:
        dataset = dataset.remove_columns(TEACHER_LOGITS)
    feature = SequenceFeature(Value("float32"), length=logits.shape[1])
    return dataset.add_column(TEACHER_LOGITS, list(logits), feature=feature)


@torch.no_grad()
def _logits(teacher: nn.Module, image_embeds: torch.Tensor) -> torch.Tensor:
    with eval_mode(teacher):
        return teacher(image_embeds=image_embeds.to(execution_device(teacher))).logits.float().cpu()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
