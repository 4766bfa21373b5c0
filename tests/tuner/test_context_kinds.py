"""Vectors that differ from class to class or from image to image."""

import functools

import adapters
import pytest
import torch
from adapters import learnable
from conftest import CLASS_NAMES, TINY_CLIP
from peft import PeftModel, get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.text import encoder


prompted = functools.partial(adapters.prompted, num_virtual_tokens=3)


# Class-specific


def test_every_class_has_vectors_of_its_own(classifier, pixel_values):
    model = prompted(classifier, class_specific=True)
    (vectors,) = learnable(model).values()
    assert vectors.shape == (4, 3, 128)
    before = classifier.get_class_embeds()
    with torch.no_grad():
        vectors[2] += 0.1
    changed = (classifier.get_class_embeds() != before).any(dim=1)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB"])
def test_class_specific_vectors_start_from_words_too(classifier, init):
    (vectors,) = learnable(prompted(classifier, class_specific=True, prompt_tuning_init=init)).values()
    table = classifier.text_model.embeddings.token_embedding.weight
    assert all((table == row).all(dim=1).any() for row in vectors.flatten(0, 1))
    assert torch.equal(vectors[0], vectors[1]) == (init == "TEXT")


@pytest.mark.parametrize(
    "class_names", [["sun", "moon"], CLASS_NAMES[::-1], CLASS_NAMES[:3]], ids=["others", "another order", "fewer"]
)
def test_other_classes_than_the_trained_ones_are_refused(classifier, class_names):
    prompted(classifier, class_specific=True)
    with pytest.raises(ValueError, match="vectors of their own for each of its 4 classes .* class_specific=False"):
        classifier.set_class_names(class_names)
    assert classifier.class_names == CLASS_NAMES
    classifier.set_class_names(CLASS_NAMES)


def test_loading_brings_the_trained_classes_along(classifier, pixel_values, tmp_path):
    model = prompted(classifier, class_specific=True)
    expected = model(pixel_values=pixel_values).logits
    model.save_pretrained(tmp_path)
    other = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["sun", "moon"])
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert loaded.get_base_model().class_names == CLASS_NAMES
    assert torch.equal(loaded(pixel_values=pixel_values).logits, expected)


def test_class_specific_vectors_need_classes(clip):
    with pytest.raises(ValueError, match="class_specific makes vectors for each class, but no class names are known"):
        get_peft_model(clip, CLIPPromptTuningConfig(class_specific=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"class_specific": True},
        {"image_conditioned": True},
        {"class_token_position": "front"},
        {"class_aware_layer": 1},
    ],
    ids=["class_specific", "image_conditioned", "front", "class_aware"],
)
def test_a_plain_clip_cannot_know_whose_text_it_sees(clip, tokenizer, fields):
    model = prompted(clip, class_names=CLASS_NAMES, prompt_template="{}.", **fields)
    texts = tokenizer(["X X X cat."], return_tensors="pt")
    with pytest.raises(ValueError, match="A text alone does not tell adapter 'default'.*CLIPForPromptClassification"):
        model.get_text_features(**texts)


def test_vectors_and_positions_of_each_text_can_be_handed_in(clip, tokenizer):
    prompted(clip, class_names=CLASS_NAMES, class_specific=True)
    layer = clip.text_model.embeddings
    ids = tokenizer(["a photo of a cat."] * 2, return_tensors="pt")["input_ids"]
    vectors, positions = torch.randn(2, 3, 128), torch.tensor([[1, 2, 3], [2, 4, 1]])
    with layer.per_text(vectors, positions):
        embeds = layer(ids) - layer.position_embedding.weight[: ids.shape[1]]
    torch.testing.assert_close(embeds[0, 1:4], vectors[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds[1, [2, 4, 1]], vectors[1], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="A text alone does not tell"):
        layer(ids)


@pytest.mark.parametrize("fields", [{"class_specific": True}, {"text_prompt_depth": 2}])
def test_adapters_that_need_a_layer_to_themselves_are_not_active_together(classifier, fields):
    model = prompted(classifier, start_idx=2, **fields)
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=1))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="'default' works on its own only, because its? .* activate one of them"):
        classifier.get_class_embeds()


# Conditioned on the image


def image_by_image(classifier, image_embeds):
    """CoCoOp as its authors run it: one image after the other, all classes for each."""
    tensors = {
        name.rpartition("learnable_")[2].replace(".default", ""): value
        for name, value in learnable(classifier).items()
    }
    hidden = torch.nn.functional.linear(image_embeds, tensors["meta_in.weight"], tensors["meta_in.bias"]).relu()
    shifts = torch.nn.functional.linear(hidden, tensors["meta_out.weight"], tensors["meta_out.bias"])
    prompts, layer, embeds = classifier.class_prompts, classifier.text_model.embeddings, []
    for shift in shifts:
        vectors = (tensors["embeddings"] + shift).expand(len(prompts.texts), -1, -1)
        with layer.per_text(vectors):
            features = classifier.get_text_features(prompts.input_ids, prompts.attention_mask).pooler_output
        embeds.append(torch.nn.functional.normalize(features, dim=-1))
    return torch.stack(embeds)


@pytest.mark.parametrize("prompts_at_once", [1, 8, 256])
def test_all_images_at_once_and_in_chunks_equal_one_image_after_the_other(classifier, monkeypatch, prompts_at_once):
    monkeypatch.setattr(encoder, "PROMPTS_AT_ONCE", prompts_at_once)
    prompted(classifier, image_conditioned=True)
    image_embeds = torch.nn.functional.normalize(torch.randn(5, 128), dim=-1)
    weights = torch.randn(5, 4, 128)

    def gradients(embeds):
        classifier.zero_grad()
        (embeds * weights).sum().backward()
        return {name: value.grad.clone() for name, value in learnable(classifier).items()}

    expected, found = image_by_image(classifier, image_embeds), classifier.get_class_embeds(3 * image_embeds)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-4, atol=1e-5)


def test_memory_of_a_training_step_does_not_grow_with_the_images_of_a_batch(classifier, monkeypatch):
    monkeypatch.setattr(encoder, "PROMPTS_AT_ONCE", 8)
    prompted(classifier, image_conditioned=True)

    def kept_for_the_backward_pass(num_images):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel() * (tensor.shape[-1] == 512)  # the hidden width of a layer
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            classifier.get_class_embeds(torch.randn(num_images, 128))
        return kept

    assert kept_for_the_backward_pass(16) == kept_for_the_backward_pass(4) == 0
    assert kept_for_the_backward_pass(2) > 0  # one chunk need not be computed twice


def test_memory_of_a_training_step_does_not_grow_with_the_classes_either(classifier):
    prompted(classifier, image_conditioned=True)
    classifier.set_class_names([f"cat {number}" for number in range(8)])
    classifier.class_encoder.batch_size = 4
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * (tensor.shape[-1] == 512)  # the hidden width of a layer
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        classifier.get_class_embeds(torch.randn(1, 128))
    assert kept == 0


def test_class_embeddings_that_depend_on_the_image_cannot_be_had_without_one(classifier):
    prompted(classifier, image_conditioned=True)
    with pytest.raises(ValueError, match=r"makes its class embeddings for each image; pass image_embeds, \(B, 128\)"):
        classifier.get_class_embeds()


def test_conditioned_vectors_go_with_vision_prompts_and_other_positions(classifier, pixel_values, labels):
    fields = {"class_token_position": "middle", "num_vision_virtual_tokens": 2, "prompt_template": "{}."}
    model = prompted(classifier, image_conditioned=True, **fields).train()
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    assert all(value.grad.abs().max() > 0 for value in learnable(model).values())
