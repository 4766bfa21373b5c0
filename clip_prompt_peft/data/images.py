"""Pixel values, augmentation, precomputed image embeddings and a content hash of the images of a dataset."""

from __future__ import annotations

import hashlib
import logging
import math
import uuid
from collections.abc import Sequence

import fsspec
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from datasets.fingerprint import Hasher
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from ..image_files import UnreadableImageError, decode_image, process_images
from ..towers import adapter_settings, embed_width, eval_mode, execution_device, hooks_of, image_side
from .columns import IMAGE, LABEL, check_is_one_split, check_label_order, check_labels_are_numbers, with_known_types


logger = logging.getLogger(__name__)

NUM_TRIES = 10
STREAM_BATCH = 32  # images of a stream that are decoded at once
DTYPES = ("float32", "float16")
DECODING = 2  # to be raised when decode_image or process_images give other pixels, or old embeddings are read
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
    image_processor,
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
        UnreadableImageError: If rows hold no image.
    """
    check_rows(dataset)
    return dataset.cast_column(IMAGE, ImageFeature(decode=False))


def check_rows(dataset: Dataset) -> None:
    """Raises an `UnreadableImageError` if rows hold no image: neither bytes nor a path. Images are not read."""
    if isinstance(dataset, IterableDataset):  # told by `decode`, when such a row comes
        return
    images = dataset.data.column(IMAGE)  # of all rows, also of those that were not selected
    content, path = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
    length = pc.fill_null(pc.binary_length(content), 0)
    if not pc.any(pc.and_(pc.equal(length, 0), pc.is_null(path))).as_py():
        return
    rows = dataset.select_columns(IMAGE).cast_column(IMAGE, ImageFeature(decode=False))
    empty = [str(number) for number, row in enumerate(rows) if _is_empty(row[IMAGE])]
    if empty:
        split = f" of the split {str(dataset.split)!r}" if dataset.split else ""
        raise UnreadableImageError(
            f"{len(empty)} of {len(dataset)} rows{split} hold no image, neither bytes nor a path; counted from 0: "
            f"{', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}. Remove these rows, or add their images."
        )


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
        views = [self.augmentation(image) for image in images]
        return process_images(self.image_processor, views, do_resize=False, do_center_crop=False)


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
    """
    Computes the embeddings of all images once, so that training and evaluation do not run the image tower again.

    By default, each image is embedded as the processor prepares it for evaluation, which is exact. With `num_views`,
    that many random crops of each image are embedded, and each access to an example returns a random one of them. This
    approximates the usual augmentation, which draws a new crop in each epoch.

    The embeddings are computed with `datasets.map` and stored in the cache folder of the dataset. A second call with
    the same images, weights and settings reads them from there. A stream is read once, and the embeddings of all its
    images are kept in memory. Hooks in the image tower, or another `forward` of one of its modules, can change the
    embeddings in ways that nobody can compare. With them, the embeddings are computed anew and kept in memory, and a
    warning is logged.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A dataset of N examples with the columns `image` and `label`.
        model (`PreTrainedModel` or `PeftModel`):
            The CLIP-like model. It is not changed.
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        batch_size (`int`, *optional*, defaults to 64):
            The number of images per forward pass.
        num_views (`int`, *optional*):
            The number K of random crops per image.
        dtype (`str`, *optional*, defaults to `"float32"`):
            The type of the stored embeddings, `"float32"` or `"float16"`.
        seed (`int`, *optional*, defaults to 0):
            The seed of the random crops.
        description (`str`, *optional*):
            The text beside the progress bar.

    Returns:
        `datasets.Dataset`: The columns `image_embeds` (N, E), not normalized, and `labels` (N,) as tensors, ready for
        the Trainer.

    Raises:
        ValueError: If the image tower is trainable, if `num_views` or `dtype` is invalid, if the labels are no
            numbers, or if they number the model's classes in another order.
        UnreadableImageError: If an image cannot be read.

    Example:

    ```py
    >>> train_set = cache_image_embeds(images["train"], model, image_processor)
    >>> Trainer(model, args, train_dataset=train_set).train()
    ```
    """
    if num_views is not None and not (isinstance(num_views, int) and num_views >= 1):
        raise ValueError(f"num_views must be a positive integer or None, got {num_views!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_image_side_is_frozen(model)
    if isinstance(dataset, IterableDataset):
        dataset = with_known_types(dataset, once=True)
    check_labels_are_numbers(dataset)
    check_label_order(dataset, getattr(model, "class_names", None))
    feature = SequenceFeature(Value(dtype), length=embed_width(model.config))
    if num_views is not None:
        feature = SequenceFeature(feature, length=num_views)
    embed = _EmbedImages(model, image_processor, num_views, seed)
    images = undecoded(dataset.select_columns([IMAGE, LABEL]))
    features = Features(image_embeds=feature, labels=dataset.features[LABEL])
    batch_size = max(1, batch_size // (num_views or 1))
    with eval_mode(model):
        if isinstance(images, IterableDataset):
            parts = [Dataset.from_dict(embed(batch), features=features) for batch in images.iter(batch_size)]
            if not parts:
                raise ValueError("The stream has no examples.")
            embedded = concatenate_datasets(parts)
        else:
            if embed.hooked is not None:
                logger.warning(
                    "%r has hooks or another forward, which may change the embeddings: they are computed now and kept "
                    "in memory only, neither read from the cache nor written to it. Remove them to use the cache.",
                    embed.hooked,
                )
            embedded = images.map(
                embed,
                batched=True,
                batch_size=batch_size,
                remove_columns=[IMAGE, LABEL],
                features=features,
                keep_in_memory=embed.hooked is not None,
                load_from_cache_file=None if embed.hooked is None else False,
                desc=description or "Embedding images",
            )
    return embedded.with_format("torch") if num_views is None else embedded.with_transform(_draw_view)


def _check_image_side_is_frozen(model: PreTrainedModel) -> None:
    trainable = [name for part in image_side(model) for name, p in part.named_parameters() if p.requires_grad]
    # All parameters are trainable after `from_pretrained`; it is an adapter that freezes the base model.
    if trainable and not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"The image side of the model is trainable ({len(trainable)} tensors, such as {trainable[0]!r}), so the "
            "embeddings change in each step. Train on pixel_values: with_pixel_values(dataset, image_processor)."
        )


class _EmbedImages:
    """Turns a batch of `image` and `label` into `image_embeds` and `labels`."""

    def __init__(self, model: PreTrainedModel, image_processor, num_views: int | None, seed: int) -> None:
        self.model, self.num_views, self.seed = model, num_views, seed
        self.transform = PixelTransform(image_processor, augment=num_views is not None)
        if num_views is not None:
            self.transform.augmentation.generator = torch.Generator().manual_seed(seed)
        self.hooked = _hooked_module(model)
        self.token = uuid.uuid4().hex

    def __getstate__(self) -> dict:
        # `datasets` hashes this to find a cached result, so it holds everything that the embeddings depend on.
        return {
            "image_side": _hash_of_image_side(self.model),
            "processor": self.transform.image_processor.to_dict(),
            "views": None if self.num_views is None else (self.num_views, self.seed),
            "decoding": DECODING,
            **({} if self.hooked is None else {"hooks": self.token}),  # equal to no other one's
        }

    @torch.no_grad()
    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [image for image in map(decode, batch[IMAGE]) for _ in range(self.num_views or 1)]
        inputs = self.transform.model_inputs(images).to(execution_device(self.model), self.model.dtype)
        embeds = self.model.get_image_features(**inputs).pooler_output.float().cpu()  # (B K, E)
        if self.num_views is not None:
            embeds = embeds.unflatten(0, (-1, self.num_views))  # (B, K, E)
        return {"image_embeds": embeds.numpy(), "labels": batch[LABEL]}


def _hooked_module(model: PreTrainedModel) -> str | None:
    """Returns the path of a module of the image side with hooks, or a `forward` of its own; `None` if there is none.

    Hooks of transformers do not count: they look, or ask for gradients. accelerate's forward moves tensors only.
    """
    inside = {module for part in image_side(model) for module in part.modules()}
    for path, module in model.named_modules():
        hooks = hooks_of(module).values() if module in inside else ()
        has_hook = any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks)
        if has_hook or (module in inside and "forward" in vars(module) and not hasattr(module, "_hf_hook")):
            return path
    return None


def _hash_of_image_side(model: PreTrainedModel) -> str:
    parts = image_side(model)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    modules = [(name, module) for part in parts for name, module in part.named_modules()]
    classes = [(name, type(module).__module__, type(module).__qualname__) for name, module in modules]
    settings = model.config.vision_config.to_dict(), adapter_settings(module for _, module in modules), classes
    weights = [tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return Hasher.hash_bytes([*weights, repr(settings).encode()])


def _draw_view(batch: dict[str, list]) -> dict[str, list]:
    """Selects one of the K views of each image at random, with PyTorch's global generator."""
    views = torch.tensor(batch["image_embeds"])  # (B, K, E)
    drawn = torch.randint(views.shape[1], (len(views),))  # (B,)
    return {"image_embeds": list(views[torch.arange(len(views)), drawn]), "labels": batch["labels"]}


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
