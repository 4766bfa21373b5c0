"""Merging into the position embeddings: exact where it can be, within rounding elsewhere, and undone bit for bit."""

import pytest
import torch
from adapters import layer_of, randomize, tuned, vectors_of
from conftest import CLASS_NAMES, TINY_CLIP
from PIL import Image
from transformers import AutoProcessor, CLIPModel, pipeline

from clip_prompt_peft import CLIPPromptTuningConfig


MERGED = {"rtol": 0, "atol": 1e-4}  # merging changes the order of two additions


def text_features(model, texts):
    return model.get_text_features(**texts).pooler_output


def test_merging_adds_the_difference_to_the_word_to_its_position_embedding(clip, tokenizer):
    model = tuned(clip, num_virtual_tokens=2, start_idx=2)
    layer = layer_of(model)
    positions = layer.position_embedding.weight.clone()
    words = layer.token_embedding.weight[tokenizer("photo of", add_special_tokens=False)["input_ids"]]
    model.merge_adapter()
    torch.testing.assert_close(layer.position_embedding.weight[2:4], positions[2:4] + vectors_of(model) - words)
    untouched = [0, 1, *range(4, 77)]
    assert torch.equal(layer.position_embedding.weight[untouched], positions[untouched])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_a_broken_adapter_before_anything_changes(clip, bad):
    model = tuned(clip, num_virtual_tokens=2)
    model.add_adapter("broken", CLIPPromptTuningConfig(num_virtual_tokens=2, start_idx=3))
    vectors_of(model, "broken").data[1, 5] = bad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter broken seems to be broken"):
        model.merge_adapter(adapter_names=["default", "broken"], safe_merge=True)
    assert model.get_model_status().merged_adapters == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "broken" in name
    with pytest.raises(ValueError, match="seems to be broken"):
        model.merge_and_unload(adapter_names=["default", "broken"], safe_merge=True)


def test_a_merge_looks_for_broken_values_only_if_asked_to(clip):
    model = tuned(clip)
    vectors_of(model).data[1, 5] = float("nan")
    model.merge_adapter()
    assert layer_of(model).position_embedding.weight[2, 5].isnan()


def test_a_safe_merge_of_a_sound_adapter_is_a_merge(clip, texts):
    model = tuned(clip)
    expected = text_features(model, texts)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(text_features(merged, texts), expected, **MERGED)


def test_adapters_at_separate_positions_are_merged_together(clip, texts):
    model = tuned(clip, num_virtual_tokens=2)
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2, start_idx=3))
    randomize(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    expected = text_features(model, texts)
    before = layer_of(model).position_embedding.weight.clone()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default", "second"]
    torch.testing.assert_close(text_features(model, texts), expected, **MERGED)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).position_embedding.weight, before)


def test_adapters_at_the_same_position_are_not_merged_together(clip):
    model = tuned(clip)
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="'second' and 'default' both replace position 1"):
        model.merge_adapter(adapter_names=["second"])
    assert model.get_model_status().merged_adapters == ["default"]


def test_the_merged_adapter_brings_the_texts_and_not_the_active_one(classifier, pixel_values):
    model = tuned(classifier, num_virtual_tokens=6)
    expected = model(pixel_values=pixel_values).logits
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter("second")
    model.merge_adapter(adapter_names=["default"])
    assert layer_of(model).prompt_layout.padded_template == "X X a photo of a {}."
    torch.testing.assert_close(model(pixel_values=pixel_values).logits, expected, **MERGED)


def test_merging_nothing_by_name_changes_nothing(clip):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    merged = tuned(clip).merge_and_unload(adapter_names=[])
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_merged_within_its_precision_and_restored_exactly(texts, dtype):
    model = tuned(CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype))
    table = layer_of(model).position_embedding.weight
    before, expected = table.clone(), text_features(model, texts).float()
    model.merge_adapter()
    assert table.dtype == dtype
    error = (text_features(model, texts).float() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
    model.unmerge_adapter()
    assert torch.equal(table, before)


def test_the_merged_classifier_keeps_classes_and_texts(classifier, pixel_values):
    model = tuned(classifier, num_virtual_tokens=6)
    expected = model(pixel_values=pixel_values).logits
    merged = model.merge_and_unload()
    assert merged.class_names == CLASS_NAMES
    assert merged.prompt_template == "X X a photo of a {}."
    torch.testing.assert_close(merged(pixel_values=pixel_values).logits, expected, **MERGED)


@pytest.mark.parametrize("num_virtual_tokens", [2, 4, 6])
def test_a_merged_plain_clip_classifies_in_the_stock_pipeline_as_the_tuned_one(classifier, num_virtual_tokens):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, 48, 48, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(image.numpy()) for image in pixels]
    processor = AutoProcessor.from_pretrained(TINY_CLIP)
    model = tuned(classifier, num_virtual_tokens=num_virtual_tokens)
    template = model.active_peft_config.padded_template
    with torch.no_grad():
        expected = model(**processor(images=images, return_tensors="pt")).logits.softmax(dim=-1)  # (2, C)
    clip = model.merge_and_unload().to_clip()
    assert type(clip) is CLIPModel
    classify = pipeline(
        "zero-shot-image-classification",
        model=clip,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    for row, answer in zip(expected, classify(images, candidate_labels=CLASS_NAMES, hypothesis_template=template)):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[name] for name in CLASS_NAMES] == pytest.approx(row.tolist(), abs=1e-5)
