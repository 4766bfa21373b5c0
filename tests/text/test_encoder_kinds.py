"""Every kind of prompt through the fast paths: class embeddings and gradients are those of the plain path."""

import pytest
import torch
from adapters import tuned
from cases import new_classifier
from class_embeds import assert_same, embeds_and_gradients
from conftest import slow_param


NAMES = ["cat", "golden retriever", "x-ray image", "lily of the valley", "C++", "arrow"]
KINDS = {
    "class_specific": {"class_specific": True},
    "middle": {"num_virtual_tokens": 5, "class_token_position": "middle"},
    "front": {"num_virtual_tokens": 6, "class_token_position": "front"},
    "class_specific_front": {"class_specific": True, "class_token_position": "front"},
    "deep_text": {"num_virtual_tokens": 3, "text_prompt_depth": 2},
    "all_layers_deep": {"text_prompt_depth": None, "num_vision_virtual_tokens": 2},
    "class_aware": {"num_virtual_tokens": 3, "class_aware_layer": 1},
    "class_aware_deep_vision": {"text_prompt_depth": 2, "class_aware_layer": 2, "num_vision_virtual_tokens": 2},
    "conditioned": {"image_conditioned": True},
    "conditioned_middle": {"image_conditioned": True, "class_token_position": "middle"},
    "conditioned_deep": {"image_conditioned": True, "text_prompt_depth": 2},
}


@pytest.fixture(params=KINDS)
def model(request):
    return tuned(new_classifier(NAMES), **KINDS[request.param])


def results_of(model, path, batch_size=None):
    image_embeds = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    return embeds_and_gradients(model, image_embeds, path=path, batch_size=batch_size)


@pytest.mark.parametrize("path", [slow_param("cut"), "packed"])
def test_the_path_gives_the_embeddings_and_gradients_of_the_plain_one(model, path):
    assert_same(results_of(model, path), results_of(model, "plain"))


@pytest.mark.parametrize("batch_size", [slow_param(1), 4])
def test_chunks_of_classes_give_the_embeddings_and_gradients_of_all_at_once(model, batch_size):
    assert_same(results_of(model, "packed", batch_size), results_of(model, "plain"))


def test_images_a_few_at_a_time_give_the_embeddings_and_gradients_of_all_at_once(monkeypatch):
    model = tuned(new_classifier(NAMES), image_conditioned=True)
    expected = results_of(model, "auto")
    monkeypatch.setattr("clip_prompt_peft.text.encoder.PROMPTS_AT_ONCE", 2 * len(NAMES))
    assert_same(results_of(model, "auto"), expected)


def test_the_fastest_path_is_taken_by_itself(model):
    assert_same(results_of(model, "auto", "auto"), results_of(model, "plain"))
