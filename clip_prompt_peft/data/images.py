"""Pixel values, augmentation and a content hash of the images of a dataset."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from ..image_files import process_images
from ..loss import TEACHER, TEACHER_LOGITS
from .columns import IMAGE, LABEL, check_is_one_split, check_label_order, check_labels_are_numbers, with_known_types
from .reading import Reader, content_of, readable, undecoded


NUM_TRIES = 10
STREAM_BATCH = 32  # images of a stream that are decoded at once
PIXELS, LABELS = "pixel_values", "labels"  # as the model calls them


class RandomResizedCropFlip:
    """
    Crops a random box of an image, resizes it to a fixed size, and flips it horizontally at random.

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
        resample (`PIL.Image.Resampling`, *optional*, defaults to `BICUBIC`):
            How to resize. Test-time tuning takes `BILINEAR`.

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
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a range between 0 and 1, got {scale}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range of positive numbers, got {ratio}.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip}.")
        self.size, self.scale, self.ratio, self.flip, self.generator = size, scale, ratio, flip, generator
        self.resample = resample

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        view = image.crop(self.random_box(*image.size)).resize((width, height), self.resample)
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
    unlabeled: bool = False,
    teacher_processor: BaseImageProcessor | None = None,
) -> Dataset | IterableDataset:
    """
    Returns a view of a dataset whose examples are `pixel_values` and `labels`, computed when they are accessed.

    The columns have these names, too, so that the Trainer, which removes columns that the model does not take, keeps
    them.

    A transform of the dataset (`dataset.with_transform(f)`, `set_transform`) comes first, at each access: what it
    returns under `image` is prepared for the model, and what it returns under `label`, if anything, is the label. It
    may return images of Pillow, arrays, or tensors with the values of an image (0 to 1, or 0 to 255). Other formats,
    such as `with_format("torch")`, have no effect. A mode of the column, such as `datasets.Image(mode="L")`, is what
    images are converted to before they become RGB.

    For [`DistillationTrainer`], images need no labels, and a teacher of another family or size can have pixel values
    of its own. The column `teacher_logits` of [`~data.cache_teacher_logits`] is kept.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A dataset with the columns `image` and `label`.
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        augment (`bool`, *optional*, defaults to `False`):
            Whether to replace the resizing and cropping of the processor with [`RandomResizedCropFlip`], for training.
        class_names (`Sequence[str]`, *optional*):
            The classes of the model, `model.class_names`, to check that the labels number them in this order.
        unlabeled (`bool`, *optional*, defaults to `False`):
            Whether to leave labels out; a column of them need not be there.
        teacher_processor (`BaseImageProcessor`, *optional*):
            The image processor of a teacher. Its outputs for the same views of the images are added, with `teacher_`
            in front of their names.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The same examples, transformed lazily. Accessing an example
        whose image is damaged raises `UnreadableImageError`.

    Raises:
        TypeError: If the column of images is not of the type `Image`, which a transform may have instead.
        ValueError: If the labels are no numbers, or number the classes in another order than `class_names`; or if
            `teacher_logits` would be combined with other views than those that they were computed for.
    """
    if isinstance(dataset, IterableDataset):
        dataset = with_known_types(dataset, None if unlabeled else LABEL)
    if not unlabeled:
        check_labels_are_numbers(dataset)
        check_label_order(dataset, class_names)
    others = [] if unlabeled else [LABEL]
    if TEACHER_LOGITS in (dataset.column_names or ()):
        if augment:
            raise ValueError(
                f"The column {TEACHER_LOGITS!r} holds what a teacher says of the images as they are, not of the "
                "random crops of augment=True; leave one of them out, and give teacher_processor for a teacher that "
                "sees the same crops in each step."
            )
        others.append(TEACHER_LOGITS)
    columns, read = readable(dataset, others)
    columns = columns.rename_columns({IMAGE: PIXELS, **({} if unlabeled else {LABEL: LABELS})})
    transform = PixelTransform(image_processor, augment, read, teacher_processor)
    if isinstance(columns, IterableDataset):
        return columns.map(transform, batched=True, batch_size=STREAM_BATCH)
    return columns.with_transform(transform)


class PixelTransform:
    """Turns a batch of images in `pixel_values` into (3, H, W) each, see [`with_pixel_values`] and [`readable`]."""

    def __init__(self, image_processor, augment: bool, read: Reader, teacher_processor=None) -> None:
        self.image_processor, self.augmentation, self.read = image_processor, None, read
        self.of_teacher = None if teacher_processor is None else PixelTransform(teacher_processor, augment, read)
        if augment:
            size = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None)
            if size is None:
                name = type(image_processor).__name__
                raise ValueError(f"{name} keeps the size and shape of each image; use augment=False.")
            self.augmentation = RandomResizedCropFlip((size["height"], size["width"]))

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if PIXELS not in batch:  # `datasets` reads some columns alone, for example to filter by them
            return batch
        images, labels = self.read(batch[PIXELS], batch.get(LABELS))
        if labels is not None:
            batch = batch | {LABELS: list(labels)}
        of_teacher = {}
        if self.of_teacher is not None:
            with torch.random.fork_rng(devices=[]):  # the model's own views are drawn by the same numbers
                of_teacher = self.of_teacher.model_inputs(images)
        inputs = {**self.model_inputs(images), **{f"{TEACHER}{name}": value for name, value in of_teacher.items()}}
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
            A dataset with the columns `image` and `label`. Images are read but not decoded, and a transform of the
            dataset does not count.

    Returns:
        `str`: The first 16 hexadecimal digits of a SHA-256. Two datasets have the same hash if and only if their
        examples are the same.
    """
    check_is_one_split(dataset)
    names = dataset.features[LABEL].names
    digest = hashlib.sha256()
    for example in undecoded(dataset.select_columns([IMAGE, LABEL])):
        content = content_of(example[IMAGE])
        if isinstance(content, str):
            with open(content, "rb") as file:
                content = file.read()
        for part in (content, names[example[LABEL]].encode()):  # with lengths, so that the boundary counts
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
