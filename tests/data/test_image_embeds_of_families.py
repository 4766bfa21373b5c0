"""Tests of pixel values and precomputed embeddings with every model family."""

import pytest
import torch
from conftest import EMOJI
from families import FAMILIES

from clip_prompt_peft.data import cache_image_embeds, load_image_dataset, with_pixel_values


@pytest.fixture
def dataset(tmp_path):
    files = {"train": str(EMOJI / "noto-train.parquet")}
    return load_image_dataset(files=files, cache_dir=str(tmp_path))["train"].select(range(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_give_the_logits_of_their_images(name, dataset):
    family = FAMILIES[name]
    classifier = family.classifier()
    examples = with_pixel_values(dataset, family.image_processor)[:]
    assert examples.pop("labels") == list(dataset["label"])
    images = {key: torch.stack([torch.as_tensor(value) for value in values]) for key, values in examples.items()}
    assert images.keys() == family.image_inputs().keys()
    embeds = cache_image_embeds(dataset, classifier, family.image_processor, batch_size=2)
    with torch.no_grad():
        from_pixels = classifier(**images).logits
        from_embeds = classifier(image_embeds=embeds[:]["image_embeds"]).logits
    torch.testing.assert_close(from_embeds, from_pixels, rtol=0, atol=1e-4)


def test_random_crops_are_refused_where_images_keep_their_shape(dataset):
    with pytest.raises(ValueError, match="keeps the size and shape of each image"):
        with_pixel_values(dataset, FAMILIES["Siglip2"].image_processor, augment=True)
