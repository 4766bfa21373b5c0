"""Every kind of prompt through the fast paths: class embeddings and gradients are those of the plain path."""

import pytest
import torch
from adapters import randomize
from conftest import TINY_CLIP
from peft import get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


NAMES = ["cat", "golden retriever", "x-ray image", "lily of the valley", "C++", "arrow"]
KINDS = {
    "class_specific": {"class_specific": True},
    "middle": {"num_virtual_tokens": 5, "class_token_position": "middle"},
    "front": {"num_virtual_tokens": 6, "class_token_position": "front"},
    "class_specific_front": {"class_specific": True, "class_token_position": "front"},
    "deep_text": {"num_virtual_tokens": 3, "text_prompt_depth": 2},
    "all_layers_deep": {"text_prompt_depth": None, "num_vision_virtual_tokens": 2},
    "conditioned": {"image_conditioned": True},
    "conditioned_middle": {"image_conditioned": True, "class_token_position": "middle"},
    "conditioned_deep": {"image_conditioned": True, "text_prompt_depth": 2},
}


@pytest.fixture(params=KINDS)
def tuned(request):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)
    model = get_peft_model(model, CLIPPromptTuningConfig(**KINDS[request.param]))
    randomize(model)
    return model


def embeds_and_gradients(model, path, batch_size=None):
    classifier = model.get_base_model()
    classifier.class_encoder.path, classifier.class_encoder.batch_size = path, batch_size
    image_embeds = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    embeds = classifier.get_class_embeds(image_embeds)  # (C, E) or (B, C, E)
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (embeds * weights).sum().backward()
    return embeds.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("path", ["cut", "packed"])
def test_the_path_gives_the_embeddings_and_gradients_of_the_plain_one(tuned, path):
    assert_same(embeds_and_gradients(tuned, path), embeds_and_gradients(tuned, "plain"))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_chunks_of_classes_give_the_embeddings_and_gradients_of_all_at_once(tuned, batch_size):
    assert_same(embeds_and_gradients(tuned, "packed", batch_size), embeds_and_gradients(tuned, "plain"))


def test_images_a_few_at_a_time_give_the_embeddings_and_gradients_of_all_at_once(monkeypatch):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)
    model = get_peft_model(model, CLIPPromptTuningConfig(image_conditioned=True))
    randomize(model)
    expected = embeds_and_gradients(model, "auto")
    monkeypatch.setattr("clip_prompt_peft.text.encoder.PROMPTS_AT_ONCE", 2 * len(NAMES))
    assert_same(embeds_and_gradients(model, "auto"), expected)


def test_the_fastest_path_is_taken_by_itself(tuned):
    assert_same(embeds_and_gradients(tuned, "auto", "auto"), embeds_and_gradients(tuned, "plain"))
