"""Images with labels, whose embeddings by the frozen image tower are computed at most once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import ClassLabel, Dataset

from ..data import cache_image_embeds, class_names_of, keep_classes, sample_few_shot, with_pixel_values
from ..data.columns import LABEL


ROW = "row"


@dataclass
class ImagePool:
    """
    A split of a data set and, row by row, its image embeddings as far as they were asked for.

    Args:
        dataset: N examples with the columns `image` and `label`.
    """

    dataset: Dataset
    _embeds: torch.Tensor | None = field(default=None, init=False)  # (N, E)
    _is_known: torch.Tensor | None = field(default=None, init=False)  # (N,)

    def embeds(self, rows: Sequence[int], model, image_processor) -> torch.Tensor:
        """(len(rows), E) projected image embeddings, not normalised."""
        if self._embeds is None:
            self._embeds = torch.zeros(len(self.dataset), model.config.projection_dim)
            self._is_known = torch.zeros(len(self.dataset), dtype=torch.bool)
        rows = torch.as_tensor(rows)
        missing = rows[~self._is_known[rows]].unique()
        if len(missing):
            embedded = cache_image_embeds(self.dataset.select(missing.tolist()), model, image_processor)
            self._embeds[missing] = embedded["image_embeds"][:]
            self._is_known[missing] = True
        return self._embeds[rows]

    def all(self) -> ImageSet:
        """All images, with the classes as they are."""
        return self._image_set(self._numbered())

    def classes(self, label_names: Sequence[str]) -> ImageSet:
        """The images of some classes; the i-th of `label_names` becomes label i."""
        return self._image_set(keep_classes(self._numbered(), label_names))

    def few_shot(
        self, shots: int, seed: int, when_fewer: str = "error", label_names: Sequence[str] | None = None
    ) -> ImageSet:
        """`shots` images of each class. The draw is made of all classes, also if only `label_names` are kept."""
        drawn = sample_few_shot(self._numbered(), shots, seed=seed, when_fewer=when_fewer)
        return self._image_set(drawn if label_names is None else keep_classes(drawn, label_names))

    def _numbered(self) -> Dataset:
        return self.dataset.select_columns([LABEL]).add_column(ROW, list(range(len(self.dataset))))

    def _image_set(self, numbered: Dataset) -> ImageSet:
        return ImageSet(self, numbered[ROW][:], numbered[LABEL][:], class_names_of(numbered))


@dataclass(frozen=True)
class ImageSet:
    """
    Images out of a pool, with labels of their own.

    Attributes:
        pool: where the images are.
        rows: their places in it.
        labels: of each, counting from 0.
        class_names: what the labels are called, as they stand in a prompt.
    """

    pool: ImagePool
    rows: list[int]
    labels: list[int]
    class_names: list[str]

    def embeds(self, model, image_processor) -> torch.Tensor:
        """(N, E) projected image embeddings, not normalised."""
        return self.pool.embeds(self.rows, model, image_processor)

    def embedded(self, model, image_processor) -> Dataset:
        """`image_embeds` and `labels`, for training with a frozen image tower."""
        columns = {"image_embeds": self.embeds(model, image_processor).numpy(), "labels": self.labels}
        return Dataset.from_dict(columns).with_format("torch")

    def pixels(self, image_processor) -> Dataset:
        """`pixel_values` and `labels`, made when they are read."""
        images = self.pool.dataset.select(self.rows).remove_columns(LABEL)
        feature = ClassLabel(names=self.class_names)
        return with_pixel_values(images.add_column(LABEL, self.labels, feature=feature), image_processor)
