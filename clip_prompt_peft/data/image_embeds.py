"""Image embeddings of a dataset, computed once and stored, with images decoded by other processes on request."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from datasets.fingerprint import Hasher
from peft import PeftModel
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..image_files import UnreadableImageError
from ..text.casts import keep_casts
from ..towers import (
    adapter_settings,
    embed_width,
    eval_mode,
    execution_device,
    hooks_of,
    image_side,
    inner_tensors,
    is_quantized,
)
from .columns import IMAGE, LABEL, check_label_order, check_labels_are_numbers, with_known_types
from .images import PixelTransform
from .reading import Reader, TransformReader, name_of, paths_without_content, readable, transform_of


logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16")
COMPUTE_DTYPES = ("bfloat16", "float16")
DECODING = 2  # to be raised when decode_image or process_images give other pixels, or old embeddings are read
DRAWING = 2  # to be raised when other views are drawn
MAX_SEED = 2**63 - 1
MAX_IN_MEMORY = 2**28  # bytes of embeddings


class EmbeddedImages(Dataset):
    """
    A `datasets.Dataset` of image embeddings, whose rows a `DataLoader` gets from one tensor in place of Arrow.

    A training step on embeddings is so short that reading its batch from Arrow would take a good part of it.
    Everything else is as in `datasets.Dataset`, and so is reading in another format, or more than 256 MiB.
    """

    _in_memory: dict[str, torch.Tensor] | None = None

    def __getstate__(self) -> dict:
        # Its methods copy a dataset before they change its data.
        return {name: value for name, value in vars(self).items() if name != "_in_memory"}

    def __getitems__(self, keys: list[int]) -> list[dict]:
        form = self.format
        draws_views = form["format_kwargs"].get("transform") is _draw_view
        is_known = draws_views or (form["type"] == "torch" and not form["format_kwargs"])
        if not is_known or form["columns"] != self.column_names or self.data.nbytes > MAX_IN_MEMORY:
            return super().__getitems__(keys)
        if self._in_memory is None:
            self._in_memory = self.with_format("torch")[:]
        rows = torch.as_tensor(keys)
        batch = {name: values[rows] for name, values in self._in_memory.items()}
        batch = _draw_view(batch) if draws_views else batch
        return [dict(zip(batch, row)) for row in zip(*batch.values())]


def cache_image_embeds(
    dataset: Dataset,
    model: PreTrainedModel | PeftModel,
    image_processor: BaseImageProcessor,
    batch_size: int = 64,
    num_views: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    description: str | None = None,
    num_workers: int = 0,
    compute_dtype: str | None = None,
) -> Dataset:
    """
    Computes the embeddings of all images once, so that training and evaluation do not run the image tower again.

    By default, each image is embedded as the processor prepares it for evaluation, which is exact. With `num_views`,
    that many random crops of each image are embedded, and each access to an example returns a random one of them. This
    approximates the usual augmentation, which draws a new crop in each epoch.

    The embeddings are computed with `datasets.map` and stored in the cache folder of the dataset. A second call with
    the same images, weights and settings reads them from there. Files that the dataset names by their paths are the
    same as long as their size and time of change are. A stream is read once, and the embeddings of all its
    images are kept in memory. Hooks in the image tower, or another `forward` of one of its modules, can change the
    embeddings in ways that nobody can compare. With them, the embeddings are computed anew and kept in memory, and a
    warning is logged. A transform of the dataset is applied as in [`with_pixel_values`], but once to each image, which
    a warning tells.

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
        num_workers (`int`, *optional*, defaults to 0):
            The number of processes that decode and transform images while the image tower runs, as
            `dataloader_num_workers` of the Trainer. With 0, the calling process does it itself. The result does not
            depend on it.
        compute_dtype (`str`, *optional*):
            The precision in which the image tower computes: `"bfloat16"` or `"float16"` by autocast. By default that
            of its weights. It changes the embeddings a little.

    Returns:
        `datasets.Dataset`: The columns `image_embeds` (N, E), not normalized, and `labels` (N,) as tensors, ready for
        the Trainer.

    Raises:
        ValueError: If the image tower is trainable, if a setting is invalid, if the labels are no numbers, or if they
            number the model's classes in another order.
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
    if not (isinstance(num_workers, int) and num_workers >= 0):
        raise ValueError(f"num_workers must be a number of processes, 0 or more, got {num_workers!r}.")
    if compute_dtype not in (None, *COMPUTE_DTYPES):
        names = ", ".join(map(repr, COMPUTE_DTYPES))
        raise ValueError(f"compute_dtype must be None or one of {names}, got {compute_dtype!r}.")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_image_side_is_frozen(model)
    if isinstance(dataset, IterableDataset):
        dataset = with_known_types(dataset, once=True)
    check_labels_are_numbers(dataset)
    check_label_order(dataset, getattr(model, "class_names", None))
    feature = SequenceFeature(Value(dtype), length=embed_width(model.config))
    if num_views is not None:
        feature = SequenceFeature(feature, length=num_views)
    images, read = readable(dataset)
    if (transform := transform_of(dataset)) is not None:
        logger.warning(
            "The transform %s of the dataset is applied to each image once, and not anew in each epoch. If it is "
            "random, train on with_pixel_values(dataset, image_processor) instead; to leave it out, use "
            "dataset.with_format(None).",
            name_of(transform),
        )
    features = Features(image_embeds=feature, labels=dataset.features[LABEL])
    batch_size = max(1, batch_size // (num_views or 1))
    inputs = _ModelInputs(images, read, image_processor, batch_size, num_views, seed)
    embed = _EmbedImages(model, inputs, num_workers, compute_dtype)
    with eval_mode(model), contextlib.closing(embed.batches):  # which ends the workers, also after an error
        if isinstance(images, IterableDataset):
            parts = [Dataset.from_dict(batch, features=features) for batch in embed.batches]
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
    embedded = EmbeddedImages(embedded.data, embedded.info, embedded.split)
    return embedded.with_format("torch") if num_views is None else embedded.with_transform(_draw_view)


def _check_image_side_is_frozen(model: PreTrainedModel) -> None:
    trainable = [name for part in image_side(model) for name, p in part.named_parameters() if p.requires_grad]
    # All parameters are trainable after `from_pretrained`; it is an adapter that freezes the base model.
    packed = {id(p) for part in model.modules() if is_quantized(part) for p in part.parameters(recurse=False)}
    if trainable and not all(p.requires_grad for p in model.parameters() if id(p) not in packed):
        raise ValueError(
            f"The image side of the model is trainable ({len(trainable)} tensors, such as {trainable[0]!r}), so the "
            "embeddings change in each step. Train on pixel_values: with_pixel_values(dataset, image_processor)."
        )


class _ModelInputs(TorchDataset):
    """
    The images of a dataset as batches of inputs of the image tower. Workers of a `DataLoader` make them.

    The index of a batch is its rows, as a range or, of a stream, as they are, together with a seed for each image.
    """

    def __init__(
        self, images, read: Reader, image_processor, batch_size: int, num_views: int | None, seed: int
    ) -> None:
        self.images, self.batch_size, self.num_views, self.seed = images, batch_size, num_views, seed
        self.transform = PixelTransform(image_processor, num_views is not None, read)

    def __getstate__(self) -> dict:
        # For workers that are not forked. Of a stream, which need not have a pickle, they get the rows.
        return {**vars(self), "images": None if isinstance(self.images, IterableDataset) else self.images}

    def indices(self) -> Iterator[tuple[range | dict, list[int]]]:
        """Yields the indices of all batches in order."""
        generator = torch.Generator().manual_seed(self.seed)
        for rows in self._rows():
            num_images = len(rows) if isinstance(rows, range) else len(rows[IMAGE])
            yield rows, torch.randint(MAX_SEED, (num_images,), generator=generator).tolist()

    def _rows(self) -> Iterator[range | dict]:
        if isinstance(self.images, IterableDataset):
            yield from self.images.iter(self.batch_size)
        else:
            for start in range(0, len(self.images), self.batch_size):
                yield range(start, min(start + self.batch_size, len(self.images)))

    def __getitem__(self, index: tuple[range | dict, list[int]]) -> tuple[dict, Sequence] | UnreadableImageError:
        """Returns inputs and labels, or the error: raised in a worker, its message would become a traceback."""
        rows, seeds = index
        batch = self.images[rows.start : rows.stop] if isinstance(rows, range) else rows
        try:
            images, labels = self.transform.read(batch[IMAGE], batch[LABEL])
        except UnreadableImageError as error:
            return error
        if self.num_views is None:
            return dict(self.transform.model_inputs(images)), labels
        views = [view for image, seed in zip(images, seeds) for view in self._views(image, seed)]
        return dict(self.transform.inputs_of_views(views)), labels

    def _views(self, image, seed: int) -> list:
        self.transform.augmentation.generator = torch.Generator().manual_seed(seed)
        return [self.transform.augmentation(image) for _ in range(self.num_views)]


class _EmbedImages:
    """
    Makes `image_embeds` and `labels` of all batches of images, in order. `datasets.map` calls it for each batch.

    Attributes:
        batches: The batches that are still to be made. The first one starts the workers.
    """

    def __init__(self, model: PreTrainedModel, inputs: _ModelInputs, num_workers: int, compute_dtype) -> None:
        self.model, self.inputs, self.compute_dtype = model, inputs, compute_dtype
        self.batches = self._make_batches(num_workers)
        self.hooked = _hooked_module(model)
        self.token = uuid.uuid4().hex

    def __getstate__(self) -> dict:
        # `datasets` hashes this to find a cached result, so it holds everything that the embeddings depend on.
        inputs = self.inputs
        state = {
            "image_side": _hash_of_image_side(self.model),
            "processor": inputs.transform.image_processor.to_dict(),
            "views": None if inputs.num_views is None else (inputs.num_views, inputs.seed, DRAWING),
            "decoding": DECODING,
            "files": _states_of_files(inputs),
            **({} if self.hooked is None else {"hooks": self.token}),  # equal to no other one's
        }
        return state if self.compute_dtype is None else state | {"compute_dtype": self.compute_dtype}

    def __call__(self, batch: dict[str, list]) -> dict:
        """Returns the next batch. The rows that `datasets.map` passes have been read ahead, in the same order."""
        return next(self.batches)

    def _make_batches(self, num_workers: int) -> Iterator[dict]:
        device = execution_device(self.model)
        loader = DataLoader(
            self.inputs,
            batch_size=None,
            sampler=self.inputs.indices(),
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # PyTorch's global one, which it would take, stays as it is
        )
        with self._precision(device):
            tower = keep_casts(lambda inputs: self.model.get_image_features(**inputs), image_side(self.model))
        for loaded in loader:
            if isinstance(loaded, UnreadableImageError):
                raise loaded
            inputs, labels = loaded
            yield {"image_embeds": self._embed(tower, inputs, device).numpy(), "labels": labels}

    @contextlib.contextmanager
    def _precision(self, device: torch.device):
        dtype = None if self.compute_dtype is None else getattr(torch, self.compute_dtype)
        # also off where the caller has switched autocast on
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield

    def _embed(self, tower, inputs: dict, device: torch.device) -> torch.Tensor:
        inputs = {
            name: values.to(device, self.model.dtype if values.is_floating_point() else None, non_blocking=True)
            for name, values in inputs.items()
        }
        with self._precision(device):
            embeds = tower(inputs).pooler_output.float().cpu()  # (B K, E)
        num_views = self.inputs.num_views
        return embeds if num_views is None else embeds.unflatten(0, (-1, num_views))  # (B, K, E)


def _states_of_files(inputs: _ModelInputs) -> list[tuple]:
    """Returns path, size and time of change of the files of rows without bytes, which may have been replaced."""
    read = inputs.transform.read
    images = read.dataset if isinstance(read, TransformReader) else inputs.images
    if isinstance(images, IterableDataset):
        return []  # its embeddings are not kept
    if not isinstance(images.features.get(IMAGE), ImageFeature):  # of another type, which a transform reads
        return []
    states = []
    for path in paths_without_content(images).unique().to_pylist():
        with contextlib.suppress(OSError):  # remote, or gone, which is told when it is decoded
            state = os.stat(path)
            states.append((path, state.st_size, state.st_mtime_ns))
    return states


def _as_it_is(batch):
    return batch


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
    tensors = [inner for part in parts for tensor in _tensors_of(part) for inner in inner_tensors(tensor)]
    modules = [(name, module) for part in parts for name, module in part.named_modules()]
    classes = [(name, type(module).__module__, type(module).__qualname__) for name, module in modules]
    settings = model.config.vision_config.to_dict(), adapter_settings(module for _, module in modules), classes
    weights = [tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return Hasher.hash_bytes([*weights, repr(settings).encode()])


def _tensors_of(part: torch.nn.Module) -> list[torch.Tensor]:
    """Returns parameters and buffers, and what a quantization saves beside them, such as scales of bitsandbytes."""
    saved = part.state_dict()  # first, since it puts packed weights back into the form in which they are saved
    named = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    beside = [value for name, value in saved.items() if name not in named and isinstance(value, torch.Tensor)]
    return [*part.parameters(), *part.buffers(), *beside]


def _draw_view(batch: dict[str, list]) -> dict[str, list]:
    """Selects one of the K views of each image at random, with PyTorch's global generator."""
    views = torch.as_tensor(batch["image_embeds"])  # (B, K, E)
    drawn = torch.randint(views.shape[1], (len(views),))  # (B,)
    return {"image_embeds": list(views[torch.arange(len(views)), drawn]), "labels": batch["labels"]}
