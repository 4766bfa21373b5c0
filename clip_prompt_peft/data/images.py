"""From images to pixel values, with the augmentation of CLIP's few-shot literature or without."""

from __future__ import annotations

import hashlib
import math

import torch
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from ..towers import adapter_settings, embed_width, eval_mode, image_side
from .columns import IMAGE, LABEL


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


DTYPES = ("float32", "float16")


def cache_image_embeds(
    dataset: Dataset,
    model: PreTrainedModel,
    image_processor,
    batch_size: int = 64,
    num_views: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    description: str | None = None,
) -> Dataset:
    """Embeds all images, so that tuning and evaluation need not run the image tower again.

    Without `num_views` each image is embedded as the processor prepares it for evaluation, which is exact. With
    `num_views`, that many random crops of each image are embedded, and whoever reads an example gets one of them,
    drawn anew each time. That approximates fresh crops in every epoch: they come from K and not from endlessly many.

    The work is done by `datasets.map`: a second run with the same images, weights and settings reads the result from
    the data set's cache folder. It is never taken for that of another model or other settings.

    Args:
        dataset: N examples with the columns `image` and `label`.
        model: the CLIP or its kin, or a peft model of it; it stays as it is.
        image_processor: of the model.
        batch_size: images at a time.
        num_views: K random crops of each image, in place of the image itself.
        dtype: of the stored embeddings, `"float32"` or `"float16"`.
        seed: of the random crops.
        description: of the progress bar.

    Returns:
        A data set with `image_embeds` (N, E), not normalised, and `labels` (N,), as the Trainer takes them; reading
        gives tensors.

    Raises:
        ValueError: the image tower is trained; `num_views` or `dtype` of another kind; an image that cannot be read
            (`UnreadableImageError`).

    Example:

    ```py
    >>> train_set = cache_image_embeds(images["train"], model, image_processor)
    >>> Trainer(model, args, train_dataset=train_set).train()
    ```
    """
    _check_settings(num_views, dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_image_side_is_frozen(base)
    embed = _EmbedImages(base, image_processor, num_views, seed)
    feature = Sequence(Value(dtype), length=embed_width(base.config))
    features = Features(
        image_embeds=feature if num_views is None else Sequence(feature, length=num_views),
        labels=dataset.features[LABEL],
    )
    with eval_mode(base):
        embedded = undecoded(dataset.select_columns([IMAGE, LABEL])).map(
            embed,
            batched=True,
            batch_size=max(1, batch_size // (num_views or 1)),
            remove_columns=[IMAGE, LABEL],
            features=features,
            desc=description or "Embedding images",
        )
    return embedded.with_format("torch") if num_views is None else embedded.with_transform(draw_view)


def draw_view(batch: dict[str, list]) -> dict[str, list]:
    """One of the K views (K, E) of each image at random; the numbers come from PyTorch's generator, see
    [`RandomResizedCropFlip`]."""
    views = torch.tensor(batch["image_embeds"])  # (B, K, E)
    drawn = torch.randint(views.shape[1], (len(views),))  # (B,)
    return {"image_embeds": list(views[torch.arange(len(views)), drawn]), "labels": batch["labels"]}


class _EmbedImages:
    """From a batch of `image` and `label` to `image_embeds` and `labels`."""

    def __init__(self, model: PreTrainedModel, image_processor, num_views: int | None, seed: int) -> None:
        self.model, self.num_views, self.seed = model, num_views, seed
        self.transform = PixelTransform(image_processor, augment=num_views is not None)
        if num_views is not None:
            self.transform.augmentation.generator = torch.Generator().manual_seed(seed)

    def __getstate__(self) -> dict:
        # What `datasets` hashes to see whether it has the result already: all that the embeddings depend on.
        return {
            "image_side": hash_of_image_side(self.model),
            "processor": self.transform.image_processor.to_dict(),
            "views": None if self.num_views is None else (self.num_views, self.seed),
        }

    @torch.no_grad()
    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [image for image in map(decode, batch[IMAGE]) for _ in range(self.num_views or 1)]
        inputs = self.transform.inputs(images).to(self.model.device, self.model.dtype)  # floating point ones only
        embeds = self.model.get_image_features(**inputs).pooler_output.float().cpu()  # (B K, E)
        if self.num_views is not None:
            embeds = embeds.unflatten(0, (-1, self.num_views))  # (B, K, E)
        return {"image_embeds": embeds.numpy(), "labels": batch[LABEL]}


def hash_of_image_side(model: PreTrainedModel) -> str:
    """Of the weights and settings that image embeddings depend on."""
    parts = image_side(model)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    settings = model.config.vision_config.to_dict(), adapter_settings(m for part in parts for m in part.modules())
    weights = [tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return Hasher.hash_bytes([*weights, repr(settings).encode()])


def _check_image_side_is_frozen(model: PreTrainedModel) -> None:
    trained = [name for part in image_side(model) for name, p in part.named_parameters() if p.requires_grad]
    # A model as it comes out of `from_pretrained` has everything marked as trainable; an adapter freezes the rest.
    if trained and not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"The image side of the model is trained ({len(trained)} tensors, {trained[0]!r} among them), so its "
            "embeddings change with every step and cannot be computed once. Train on pixel_values: with_pixel_values("
            "dataset, image_processor)."
        )


def _check_settings(num_views: int | None, dtype: str) -> None:
    if num_views is not None and not (isinstance(num_views, int) and num_views >= 1):
        raise ValueError(
            f"num_views must be a positive integer, or None for the images themselves, got {num_views!r}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")


def content_hash(dataset: Dataset) -> str:
    """A hash of the images' files and their class names, in order: equal if and only if the examples are.

    Args:
        dataset: with the columns `image` and `label`; images are read, not decoded.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    names = dataset.features[LABEL].names
    digest = hashlib.sha256()
    for example in dataset.select_columns([IMAGE, LABEL]).cast_column(IMAGE, ImageFeature(decode=False)):
        content = example[IMAGE]["bytes"]
        if content is None:
            with open(example[IMAGE]["path"], "rb") as file:
                content = file.read()
        name = names[example[LABEL]].encode()
        for part in (content, name):  # with their lengths, so that no two divisions are the same
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
