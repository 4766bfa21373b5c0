"""The frozen image tower, run once."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import CLIPModel, default_data_collator
from transformers.utils import logging

from .transforms import with_pixel_values


@torch.no_grad()
def compute_image_embeds(
    dataset: Dataset, model: CLIPModel, image_processor, batch_size: int = 64, description: str | None = None
) -> Dataset:
    """Embeds all images, so that tuning and evaluation need not run the image tower again.

    Exact as long as nothing in the image tower is trained and no augmentation is wanted.

    Args:
        dataset: N examples with the columns `image` and `label`.
        model: the CLIP; it stays as it is.
        image_processor: of the model.
        batch_size: images at a time.
        description: of the progress bar.

    Returns:
        A data set in torch format with `image_embeds` (N, E), not normalised, and `labels` (N,).
    """
    was_training = model.training
    model.eval()
    examples = with_pixel_values(dataset, image_processor)
    batches = DataLoader(examples, batch_size=batch_size, collate_fn=default_data_collator)
    embeds, labels = [], []
    for batch in logging.tqdm(batches, desc=description or "Embedding images", leave=False):
        features = model.get_image_features(pixel_values=batch["pixel_values"].to(model.device, model.dtype))
        embeds.append(features.pooler_output.float().cpu())  # (B, E)
        labels.append(batch["labels"])
    model.train(was_training)
    columns = {"image_embeds": torch.cat(embeds).numpy(), "labels": torch.cat(labels).numpy()}
    return Dataset.from_dict(columns).with_format("torch")
