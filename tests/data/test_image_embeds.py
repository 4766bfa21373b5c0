import torch
from conftest import EMOJI, TINY_CLIP
from transformers import AutoImageProcessor

from clip_prompt_peft.data import compute_image_embeds, load_image_dataset, with_pixel_values


def test_embeddings_stand_in_for_the_images_one_by_one(classifier):
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-train.parquet")})["train"].select(range(5))
    embeds = compute_image_embeds(dataset, classifier, image_processor, batch_size=2)
    pixel_values = torch.stack(with_pixel_values(dataset, image_processor)[:]["pixel_values"])
    with torch.no_grad():
        from_pixels = classifier(pixel_values=pixel_values).logits
        from_embeds = classifier(image_embeds=embeds[:]["image_embeds"]).logits
    torch.testing.assert_close(from_embeds, from_pixels)
    assert embeds[:]["labels"].tolist() == list(dataset["label"])


def test_the_model_is_left_in_the_mode_that_it_was_in(classifier):
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-train.parquet")})["train"].select(range(1))
    compute_image_embeds(dataset, classifier.train(), image_processor)
    assert classifier.training
