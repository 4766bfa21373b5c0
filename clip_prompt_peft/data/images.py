"""From images to pixel values, with the augmentation of CLIP's few-shot literature or without."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import BatchFeature

from .standardize import IMAGE, LABEL


NUM_TRIES = 10


class UnreadableImageError(ValueError):
    """An image of a data set is damaged, or no image at all."""


class RandomResizedCropFlip:
    """
    Cuts out a random part of an image, scales it to a fixed size (bicubic) and mirrors it half of the time.

    These are the training views of CoOp and its successors (`random_resized_crop`, `random_flip`). Random numbers come
    from PyTorch's generator, which the Trainer seeds, restores on resuming, and makes differ between the workers of a
    data loader.

    Args:
        size: (height, width) of the result.
        scale: range of the part's area, as a share of the image's.
        ratio: range of its width over its height.
        flip: probability of mirroring.
        generator: in place of PyTorch's global one.

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
            raise ValueError(f"scale must be a range inside of 0 ... 1, got {scale}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range of positive numbers, got {ratio}.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip}.")
        self.size, self.scale, self.ratio, self.flip, self.generator = size, scale, ratio, flip, generator

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        view = image.crop(self.random_box(*image.size)).resize((width, height), Image.Resampling.BICUBIC)
        mirrored = self._uniform(0, 1) < self.flip
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else view

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A random part of an image of this size: left, upper, right, lower."""
        for _ in range(NUM_TRIES):
            area = self._uniform(*self.scale) * width * height
            ratio = math.exp(self._uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                return self._placed(box_width, box_height, width, height)
        return self._largest_central_box(width, height)

    def _placed(self, box_width, box_height, width, height) -> tuple[int, int, int, int]:
        left = int(self._uniform(0, width - box_width + 1))
        upper = int(self._uniform(0, height - box_height + 1))
        return left, upper, left + box_width, upper + box_height

    def _largest_central_box(self, width, height) -> tuple[int, int, int, int]:
        # images so long or so small that no random part fitted
        box_width = max(1, min(width, round(height * self.ratio[1])))
        box_height = max(1, min(height, round(width / self.ratio[0])))
        left, upper = (width - box_width) // 2, (height - box_height) // 2
        return left, upper, left + box_width, upper + box_height

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=self.generator).item()


def with_pixel_values(dataset: Dataset, image_processor, augment: bool = False) -> Dataset:
    """A view of the data set whose examples are `pixel_values` and `labels`, made when they are asked for.

    Args:
        dataset: with the columns `image` and `label`.
        image_processor: of the model; it scales, crops and normalises for evaluation.
        augment: for training: [`RandomResizedCropFlip`] in place of the processor's own scaling and cropping.

    Returns:
        The same rows, lazily transformed; reading one raises `UnreadableImageError` if its image is damaged. The
        Trainer needs `remove_unused_columns=False` to let `image` through.
    """
    return undecoded(dataset).with_transform(PixelTransform(image_processor, augment), columns=[IMAGE, LABEL])


def undecoded(dataset: Dataset) -> Dataset:
    """The data set with images as they are in their files, for [`decode`]."""
    return dataset.cast_column(IMAGE, ImageFeature(decode=False))


def decode(image: dict) -> Image.Image:
    """An RGB image from its `path` or `bytes`, as `datasets` decodes it.

    Raises:
        UnreadableImageError: names the file, which the error of `datasets` does not, and says what to do.
    """
    try:
        return ImageFeature().decode_example(image).convert("RGB")
    except Exception as error:  # broken files raise whatever they happen to
        name = repr(image["path"]) if image["path"] else f"an image of {len(image['bytes'] or ())} bytes"
        raise UnreadableImageError(
            f"Cannot read {name}: it is damaged, or no image ({error}). Replace the file, or remove it."
        ) from error


class PixelTransform:
    """Turns a batch of examples into `pixel_values` (3, H, W) each, and `labels`; see [`with_pixel_values`]."""

    def __init__(self, image_processor, augment: bool = False) -> None:
        self.image_processor = image_processor
        self.augmentation = RandomResizedCropFlip(_input_size(image_processor)) if augment else None

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [decode(image) for image in batch[IMAGE]]
        return {name: list(values) for name, values in self.inputs(images).items()} | {"labels": batch[LABEL]}

    def inputs(self, images: list[Image.Image]) -> BatchFeature:
        """`pixel_values` (B, 3, H, W), and what else the processor makes of the images."""
        if self.augmentation is None:
            return self.image_processor(images, return_tensors="pt")
        views = [self.augmentation(image) for image in images]
        # what is left for the processor is to normalise
        return self.image_processor(views, do_resize=False, do_center_crop=False, return_tensors="pt")


def _input_size(image_processor) -> tuple[int, int]:
    size = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None)
    if size is None:
        raise ValueError(
            f"{type(image_processor).__name__} keeps the size and shape of each image, so there is no size to cut "
            "random parts to; use augment=False, or augment the images yourself."
        )
    return size["height"], size["width"]
