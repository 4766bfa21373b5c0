"""Random views of images for test-time tuning, with AugMix as a choice.

Shapes: `B` images with `V` views each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor

from ..image_files import decode_image, process_images
from .images import RandomResizedCropFlip


NUM_CHAINS, LONGEST_CHAIN = 3, 3  # of AugMix
SEVERITY = 1.0


class RandomViews:
    """
    Makes views of images: each image as its processor prepares it, and randomly cropped and flipped.

    Crops are those of [`RandomResizedCropFlip`], resized bilinearly, from the whole image.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the model. Its result has to be of the same size for all images.
        num_views (`int`, *optional*, defaults to 64):
            V, the number of views of an image, with itself.
        augmix (`bool`, *optional*, defaults to `False`):
            Whether to change the colors and the geometry of the crops, too, by AugMix. TPT does so for fine-grained
            data sets, and not for ImageNet and its variants.
        generator (`torch.Generator`, *optional*):
            The generator to use in place of PyTorch's global one.

    Raises:
        ValueError: If `num_views` is not a positive integer.

    Example:

    ```py
    >>> views = RandomViews(image_processor)(images)  # (B, 64, 3, H, W)
    ```

    Source: Shu et al., Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models (NeurIPS 2022);
    Hendrycks et al., AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty (ICLR 2020).
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        num_views: int = 64,
        augmix: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(num_views, int) or isinstance(num_views, bool) or num_views < 1:
            raise ValueError(f"num_views must be a positive integer, got {num_views!r}.")
        self.image_processor, self.num_views, self.generator = image_processor, num_views, generator
        self.augmix = augmix

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Returns the views (B, V, 3, H, W) of images, each image itself first.

        Args:
            images (`list[PIL.Image.Image]`):
                B images of one or more channels.

        Raises:
            UnreadableImageError: If an image is damaged.
            ValueError: If there is no image, or the processor does not make one size of all images.
        """
        views = [self._of_image(decode_image(image)) for image in images]
        if not views:
            raise ValueError("There are no images; give at least one.")
        if len({of_image.shape for of_image in views}) > 1:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes sizes of {sorted({(*v.shape[-2:],) for v in views})} of "
                "these images, so their views fit into no tensor; give one image at a time, or a processor that crops."
            )
        return torch.stack(views)

    def _of_image(self, image: Image.Image) -> torch.Tensor:
        """Returns the views (V, 3, H, W) of an RGB image."""
        itself = process_images(self.image_processor, [image])["pixel_values"]  # (1, 3, H, W)
        if itself.ndim != 4:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes patches of images of any shape, which are no views of "
                "one size; embed views of your own with get_image_features."
            )
        size = (itself.shape[2], itself.shape[3])
        crop = RandomResizedCropFlip(size, generator=self.generator, resample=Image.Resampling.BILINEAR)
        crops = [crop(image) for _ in range(self.num_views - 1)]
        if not crops:
            return itself
        others = torch.cat([self._augmix(view) for view in crops]) if self.augmix else self._prepared(crops)
        return torch.cat([itself, others])

    def _prepared(self, views: list[Image.Image]) -> torch.Tensor:
        return process_images(self.image_processor, views, do_resize=False, do_center_crop=False)["pixel_values"]

    def _augmix(self, view: Image.Image) -> torch.Tensor:
        """Returns a view, mixed with three chains of random operations on it, as (1, 3, H, W)."""
        weights = -self._uniform(NUM_CHAINS).log()
        weights = weights / weights.sum()  # Dirichlet(1, 1, 1)
        share = self._uniform(1)  # Beta(1, 1)
        chains = [view] * NUM_CHAINS
        for index in range(NUM_CHAINS):
            for _ in range(1 + self._below(LONGEST_CHAIN)):
                chains[index] = OPERATIONS[self._below(len(OPERATIONS))](chains[index], self._uniform(2).tolist())
        pixels = self._prepared([view, *chains])  # (4, 3, H, W)
        factors = torch.cat([share, (1 - share) * weights]).to(pixels)
        return (factors[:, None, None, None] * pixels).sum(dim=0, keepdim=True)

    def _uniform(self, number: int) -> torch.Tensor:
        """Returns random numbers in (0, 1]."""
        return 1 - torch.rand(number, dtype=torch.float64, generator=self.generator)

    def _below(self, number: int) -> int:
        return int(torch.randint(number, (), generator=self.generator))


# The operations of AugMix, without those that ImageNet-C tests. Each takes an image and two numbers in (0, 1]: the
# first makes the strength, at most a tenth of the largest one at severity 1, and the second a direction.


def _strength(number: float) -> float:
    return (0.1 + number * (SEVERITY - 0.1)) / 10


def _signed(strength: float, direction: float) -> float:
    return strength if direction > 0.5 else -strength


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _autocontrast(image: Image.Image, numbers) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, numbers) -> Image.Image:
    return ImageOps.equalize(image)


def _posterize(image: Image.Image, numbers) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(4 * _strength(numbers[0])))


def _solarize(image: Image.Image, numbers) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * _strength(numbers[0])))


def _rotate(image: Image.Image, numbers) -> Image.Image:
    return image.rotate(_signed(int(30 * _strength(numbers[0])), numbers[1]), Image.Resampling.BILINEAR)


def _shear_x(image: Image.Image, numbers) -> Image.Image:
    return _affine(image, 1, _signed(0.3 * _strength(numbers[0]), numbers[1]), 0, 0, 1, 0)


def _shear_y(image: Image.Image, numbers) -> Image.Image:
    return _affine(image, 1, 0, 0, _signed(0.3 * _strength(numbers[0]), numbers[1]), 1, 0)


def _translate_x(image: Image.Image, numbers) -> Image.Image:
    return _affine(image, 1, 0, _signed(int(image.width / 3 * _strength(numbers[0])), numbers[1]), 0, 1, 0)


def _translate_y(image: Image.Image, numbers) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(int(image.height / 3 * _strength(numbers[0])), numbers[1]))


OPERATIONS: tuple[Callable[[Image.Image, list[float]], Image.Image], ...] = (
    _autocontrast,
    _equalize,
    _posterize,
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
