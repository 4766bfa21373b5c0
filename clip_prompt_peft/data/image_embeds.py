"""The frozen image tower, run once: image embeddings as a column of the data set."""

from __future__ import annotations

import torch
from datasets import Dataset, Features, Sequence, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel

from ..class_encoder.adapter_settings import adapter_settings
from ..dual_encoder import embed_width, image_side
from ..evaluation import evaluating
from .standardize import IMAGE, LABEL
from .transforms import PixelTransform, decode, undecoded


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
    with evaluating(base):
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
