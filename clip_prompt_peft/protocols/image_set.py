"""Labeled images, whose embeddings by the frozen image tower are computed at most once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import ClassLabel, Dataset, Value

from ..data import (
    cache_image_embeds,
    cache_teacher_logits,
    class_names_of,
    keep_classes,
    sample_few_shot,
    with_pixel_values,
)
from ..data.columns import LABEL
from ..data.image_embeds import EmbeddedImages
from ..towers import embed_width


ROW = "row"  # column of the indices into the pool


@dataclass
class ImagePool:
    """
    A split of a data set, with a cache of its image embeddings.

    Args:
        dataset (`Dataset`):
            N images in the column `image` and labels in the column `label`.
    """

    dataset: Dataset
    _embeds: torch.Tensor | None = field(default=None, init=False)  # (N, E)
    _is_known: torch.Tensor | None = field(default=None, init=False)  # (N,)

    def embeds(self, rows: Sequence[int], model, image_processor) -> torch.Tensor:
        """Returns the (len(rows), E) projected image embeddings, not normalized. Only missing ones are computed."""
        if self._embeds is None:
            self._embeds = torch.zeros(len(self.dataset), embed_width(model.config))
            self._is_known = torch.zeros(len(self.dataset), dtype=torch.bool)
        rows = torch.as_tensor(rows)
        missing = rows[~self._is_known[rows]].unique()
        if len(missing):
            # Without names: the model's classes of the moment need not be those of the pool.
            unnamed = self.dataset.select(missing.tolist()).cast_column(LABEL, Value("int64"))
            embedded = cache_image_embeds(unnamed, model, image_processor)
            self._embeds[missing] = embedded["image_embeds"][:]
            self._is_known[missing] = True
        return self._embeds[rows]

    def classes(self, label_names: Sequence[str] | None = None) -> ImageSet:
        """Returns the images of all classes, or of those in `label_names`, which are then numbered in this order."""
        return self._image_set(self._numbered(), label_names)

    def few_shot(
        self, shots: int, seed: int, when_fewer: str = "error", label_names: Sequence[str] | None = None
    ) -> ImageSet:
        """Samples `shots` images per class. All classes are sampled, even if only those in `label_names` are kept."""
        drawn = sample_few_shot(self._numbered(), shots, seed=seed, when_fewer=when_fewer)
        return self._image_set(drawn, label_names)

    def _numbered(self) -> Dataset:
        return self.dataset.select_columns([LABEL]).add_column(ROW, list(range(len(self.dataset))))

    def _image_set(self, numbered: Dataset, label_names: Sequence[str] | None) -> ImageSet:
        if label_names is not None:
            numbered = keep_classes(numbered, label_names)
        return ImageSet(self, numbered[ROW][:], numbered[LABEL][:], class_names_of(numbered))


@dataclass(frozen=True)
class ImageSet:
    """
    Some images of a pool with their own labels.

    Attributes:
        pool (`ImagePool`):
            The pool that holds the images.
        rows (`list[int]`):
            The indices of the N images in the pool.
        labels (`list[int]`):
            The labels of the images.
        class_names (`list[str]`):
            The names of the labels as written in prompts.
    """

    pool: ImagePool
    rows: list[int]
    labels: list[int]
    class_names: list[str]

    def embeds(self, model, image_processor) -> torch.Tensor:
        """Returns the (N, E) projected image embeddings, not normalized."""
        return self.pool.embeds(self.rows, model, image_processor)

    def embedded(self, model, image_processor) -> Dataset:
        """Returns a data set of `image_embeds` and `labels`, for training with a frozen image tower."""
        columns = {"image_embeds": self.embeds(model, image_processor).numpy(), "labels": self.labels}
        return EmbeddedImages.from_dict(columns).with_format("torch")

    def whole_classes(self) -> ImageSet:
        """Returns all images that the pool has of these classes, not only those that were drawn."""
        label_names = self.pool.dataset.features[LABEL].names
        label_name_of = dict(zip(class_names_of(self.pool.dataset), label_names))
        return self.pool.classes([label_name_of[name] for name in self.class_names])

    def for_distillation(self, teacher, image_processor) -> Dataset:
        """Returns a data set of `pixel_values` and of the logits of a teacher of the same kind, without labels."""
        images = self.pool.dataset.select(self.rows).remove_columns(LABEL)
        images = cache_teacher_logits(images, teacher, image_processor)
        return with_pixel_values(images, image_processor, unlabeled=True)

    def pixels(self, image_processor) -> Dataset:
        """Returns a data set of `labels` and `pixel_values`, which are computed when they are read."""
        images = self.pool.dataset.select(self.rows).remove_columns(LABEL)
        feature = ClassLabel(names=self.class_names)
        return with_pixel_values(images.add_column(LABEL, self.labels, feature=feature), image_processor)
