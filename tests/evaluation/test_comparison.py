"""Comparison of a trained adapter with the zero-shot model."""

import numpy as np
import pytest
import torch
from adapters import tuned
from conftest import EMOJI, TINY_CLIP
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.data import class_names_of, load_image_dataset, with_pixel_values
from clip_prompt_peft.evaluation.comparison import Answers, Comparison, compare_with_zero_shot


@pytest.fixture(scope="module")
def dataset():
    return load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(0, 200, 8))


@pytest.fixture
def base(dataset):
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset))


@pytest.mark.parametrize("kind", ["prompts", "lora"])
@torch.no_grad()
def test_answers_are_those_of_the_model_with_and_without_its_adapter(kind, base, dataset, image_processor):
    if kind == "prompts":
        model = tuned(base)
    else:
        model = get_peft_model(base, LoraConfig(target_modules=["v_proj"], init_lora_weights=False)).eval()
    comparison = compare_with_zero_shot(model, dataset, image_processor, batch_size=7)
    examples = with_pixel_values(dataset, image_processor)[:]
    pixel_values = torch.stack(examples["pixel_values"])
    np.testing.assert_array_equal(comparison.tuned.labels, examples["labels"])
    np.testing.assert_allclose(comparison.tuned.logits, model(pixel_values=pixel_values).logits, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        expected = model(pixel_values=pixel_values).logits
    np.testing.assert_allclose(comparison.zero_shot.logits, expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(comparison.tuned.logits, comparison.zero_shot.logits)


def test_which_images_changed_sides_is_counted():
    labels = np.array([0, 0, 1, 1])
    before = Answers(np.array([[1, 0], [0, 1], [1, 0], [0, 1]]), labels)
    after = Answers(np.array([[1, 0], [1, 0], [0, 1], [1, 0]]), labels)
    comparison = Comparison(["cat", "dog"], before, after)
    assert comparison.gained.tolist() == [1, 2] and comparison.lost.tolist() == [3]
    assert (before.metrics["accuracy"], after.metrics["accuracy"]) == (0.5, 0.75)
    assert (after.class_accuracy(0), after.class_accuracy(1)) == (1.0, 0.5)
    assert np.isnan(after.class_accuracy(2))
    np.testing.assert_allclose(after.confidence, np.e / (np.e + 1))


def test_what_is_still_wrong_is_told_by_pairs_of_classes_the_most_confident_first():
    labels = np.array([0, 0, 0, 1, 2])
    logits = np.array([[0, 1, 0], [0, 3, 0], [1, 0, 0], [0, 0, 2], [0, 0, 1]])
    comparison = Comparison(["cat", "dog", "owl"], Answers(logits, labels), Answers(logits, labels))
    assert comparison.wrong.tolist() == [1, 3, 0]
    (true, predicted, count, indices), other = comparison.confused_pairs()
    assert (true, predicted, count, indices.tolist()) == ("cat", "dog", 3, [1, 0])
    assert other[:3] == ("dog", "owl", 1) and other[3].tolist() == [3]
    (_, *cat), (_, *dog), (_, *owl) = comparison.class_rows()
    assert cat == pytest.approx([3, 1 / 3, 1 / 3, 1.0])
    assert dog == pytest.approx([1, 0.0, 0.0, 0.0])  # predicted for cats only
    assert owl == pytest.approx([1, 1.0, 1.0, 0.5])
    never = Comparison(["cat", "dog"], Answers(logits[2:3, :2], labels[:1]), Answers(logits[2:3, :2], labels[:1]))
    assert np.isnan(never.tuned.class_precision(1)) and never.confused_pairs() == []


def test_images_of_other_classes_are_refused(classifier, dataset, image_processor):
    with pytest.raises(ValueError, match="not the model's classes"):
        compare_with_zero_shot(tuned(classifier), dataset, image_processor)


def test_every_module_keeps_its_training_mode(base, dataset, image_processor):
    model = tuned(base)
    model.train().vision_model.eval()
    before = {name: module.training for name, module in model.named_modules()}
    compare_with_zero_shot(model, dataset.select(range(2)), image_processor)
    assert {name: module.training for name, module in model.named_modules()} == before
