"""Pixel values, augmentation and a content hash of the images of a dataset."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from ..image_files import UnreadableImageError, decode_image, process_images
from .columns import (
    IMAGE,
    LABEL,
    check_is_one_split,
    check_label_order,
    check_labels_are_numbers,
    type_name,
    with_known_types,
)


NUM_TRIES = 10
STREAM_BATCH = 32  # images of a stream that are decoded at once
PIXELS, LABELS = "pixel_values", "labels"  # as the model calls them


class RandomResizedCropFlip:
    """
    Crops a random box of an image, resizes it to a fixed size (bicubic), and flips it horizontally at random.

    This is the training augmentation of CoOp and its successors (`random_resized_crop`, `random_flip`). The random
    numbers come from PyTorch's generator, which the Trainer seeds, restores when it resumes, and seeds differently for
    each worker of a data loader.

    Args:
        size (`tuple[int, int]`):
            Height and width of the result in pixels.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`):
            The range of the area of the box as a fraction of the area of the image.
        ratio (`tuple[float, float]`, *optional*, defaults to `(3 / 4, 4 / 3)`):
            The range of the aspect ratio (width over height) of the box.
        flip (`float`, *optional*, defaults to 0.5):
            The probability of a horizontal flip.
        generator (`torch.Generator`, *optional*):
            The generator to use in place of PyTorch's global one.

    Example:

    ```py
    >>> view = RandomResizedCropFlip((224, 224))(image)
    ```
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a range between 0 and 1, got {scale}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range of positive numbers, got {ratio}.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip}.")
        self.size, self.scale, self.ratio, self.flip, self.generator = size, scale, ratio, flip, generator

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        view = image.crop(self.random_box(*image.size)).resize((width, height), Image.Resampling.BICUBIC)
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._uniform(0, 1) < self.flip else view

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns (left, upper, right, lower) of a random box in an image of the given size."""
        for _ in range(NUM_TRIES):
            area = self._uniform(*self.scale) * width * height
            ratio = math.exp(self._uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                left = int(self._uniform(0, width - box_width + 1))
                upper = int(self._uniform(0, height - box_height + 1))
                break
        else:  # The image is so elongated or small that no box fits: take the largest central one.
            box_width = max(1, min(width, round(height * self.ratio[1])))
            box_height = max(1, min(height, round(width / self.ratio[0])))
            left, upper = (width - box_width) // 2, (height - box_height) // 2
        return left, upper, left + box_width, upper + box_height

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=self.generator).item()


def with_pixel_values(
    dataset: Dataset | IterableDataset,
    image_processor: BaseImageProcessor,
    augment: bool = False,
    class_names: Sequence[str] | None = None,
) -> Dataset | IterableDataset:
    """
    Returns a view of a dataset whose examples are `pixel_values` and `labels`, computed when they are accessed.

    The columns have these names, too, so that the Trainer, which removes columns that the model does not take, keeps
    them.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A dataset with the columns `image` and `label`.
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        augment (`bool`, *optional*, defaults to `False`):
            Whether to replace the resizing and cropping of the processor with [`RandomResizedCropFlip`], for training.
        class_names (`Sequence[str]`, *optional*):
            The classes of the model, `model.class_names`, to check that the labels number them in this order.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The same examples, transformed lazily. Accessing an example
        whose image is damaged raises `UnreadableImageError`.

    Raises:
        TypeError: If the column of images is not of the type `Image`.
        ValueError: If the labels are no numbers, or number the classes in another order than `class_names`.
    """
    if isinstance(dataset, IterableDataset):
        dataset = with_known_types(dataset)
    check_labels_are_numbers(dataset)
    check_label_order(dataset, class_names)
    columns = undecoded(dataset.select_columns([IMAGE, LABEL])).rename_columns({IMAGE: PIXELS, LABEL: LABELS})
    transform = PixelTransform(image_processor, augment)
    if isinstance(columns, IterableDataset):
        return columns.map(transform, batched=True, batch_size=STREAM_BATCH)
    return columns.with_transform(transform)


def undecoded(dataset: Dataset) -> Dataset:
    """
    Returns the dataset with its images as path and bytes, for [`decode`].

    Raises:
        TypeError: If the column is not of the type `Image`.
        UnreadableImageError: If rows hold no image.
    """
    feature = (dataset.features or {}).get(IMAGE)
    if feature is not None and not isinstance(feature, ImageFeature):
        raise TypeError(
            f"The column {IMAGE!r} holds {type_name(feature)}, but must have the type Image of datasets. If it holds "
            f"paths or the bytes of files: dataset.cast_column({IMAGE!r}, datasets.Image())."
        )
    check_rows(dataset)
    return dataset.cast_column(IMAGE, ImageFeature(decode=False))


def check_rows(dataset: Dataset) -> None:
    """Raises an `UnreadableImageError` if rows hold no image: neither bytes nor a path. Images are not read."""
    if isinstance(dataset, IterableDataset):  # told by `decode`, when such a row comes
        return
    if not paths_without_content(dataset).null_count:
        return
    rows = dataset.select_columns(IMAGE).cast_column(IMAGE, ImageFeature(decode=False))
    empty = [str(number) for number, row in enumerate(rows) if _is_empty(row[IMAGE])]
    if empty:
        split = f" of the split {str(dataset.split)!r}" if dataset.split else ""
        raise UnreadableImageError(
            f"{len(empty)} of {len(dataset)} rows{split} hold no image, neither bytes nor a path; counted from 0: "
            f"{', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}. Remove these rows, or add their images."
        )


def paths_without_content(dataset: Dataset) -> pa.ChunkedArray:
    """Returns the path, or null, of each image without bytes: of all rows, also of those that were not selected."""
    images = dataset.data.column(IMAGE)
    length = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0)
    return pc.struct_field(images, "path").filter(pc.equal(length, 0))


def _is_empty(image: dict | None) -> bool:
    return not image or not (image["bytes"] or image["path"])


def decode(image: dict | Image.Image | None) -> Image.Image:
    """
    Decodes a row of an image column with [`decode_image`], from its `bytes` or from a `path` that may be remote.

    Some operations on a stream, such as its `filter`, have opened the image already.

    Raises:
        UnreadableImageError: If that fails. The message names the file.
    """
    if isinstance(image, Image.Image):
        return decode_image(image)
    if _is_empty(image):
        raise UnreadableImageError("A row holds no image, neither bytes nor a path. Remove it, or add its image.")
    content, path = image["bytes"], image["path"]
    if content is None and "://" in path:
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except Exception as error:  # each file system has its own
            raise UnreadableImageError(
                f"Cannot read {path!r}: it cannot be fetched ({type(error).__name__}: {error}). Download it first."
            ) from error
    return decode_image(path if content is None else content, name=repr(path) if path else None)


class PixelTransform:
    """Turns a batch of images in `pixel_values` into (3, H, W) each, and keeps `labels`, see [`with_pixel_values`]."""

    def __init__(self, image_processor, augment: bool = False) -> None:
        self.image_processor, self.augmentation = image_processor, None
        if augment:
            size = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None)
            if size is None:
                name = type(image_processor).__name__
                raise ValueError(f"{name} keeps the size and shape of each image; use augment=False.")
            self.augmentation = RandomResizedCropFlip((size["height"], size["width"]))

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if PIXELS not in batch:  # `datasets` reads some columns alone, for example to filter by them
            return batch
        inputs = self.model_inputs([decode(image) for image in batch[PIXELS]])
        return batch | {name: list(values) for name, values in inputs.items()}

    def model_inputs(self, images: list[Image.Image]) -> BatchFeature:
        """Returns `pixel_values` (B, 3, H, W) and any further outputs of the processor."""
        if self.augmentation is None:
            return process_images(self.image_processor, images)
        return self.inputs_of_views([self.augmentation(image) for image in images])

    def inputs_of_views(self, views: list[Image.Image]) -> BatchFeature:
        """Returns the same for images that are cropped and resized already."""
        return process_images(self.image_processor, views, do_resize=False, do_center_crop=False)


def content_hash(dataset: Dataset) -> str:
    """
    Hashes the image files and the class names of all examples, in order.

    Args:
        dataset (`datasets.Dataset`):
            A dataset with the columns `image` and `label`. Images are read but not decoded.

    Returns:
        `str`: The first 16 hexadecimal digits of a SHA-256. Two datasets have the same hash if and only if their
        examples are the same.
    """
    check_is_one_split(dataset)
    names = dataset.features[LABEL].names
    digest = hashlib.sha256()
    for example in undecoded(dataset.select_columns([IMAGE, LABEL])):
        content = example[IMAGE]["bytes"]
        if content is None:
            with open(example[IMAGE]["path"], "rb") as file:
                content = file.read()
        for part in (content, names[example[LABEL]].encode()):  # with lengths, so that the boundary counts
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
