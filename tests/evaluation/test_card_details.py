"""Training data, settings and results in the model card."""

import re

import numpy as np
import pytest
from conftest import TINY_CLIP
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.comparison import Answers, Comparison
from clip_prompt_peft.evaluation.interpret import nearest_words
from clip_prompt_peft.evaluation.model_card import CardDetails, TrainingData


LABELS = np.array([0, 0, 1, 1])
COMPARISON = Comparison(
    ["cat|s", "dog"],
    zero_shot=Answers(np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]]), LABELS),
    tuned=Answers(np.array([[1.0, 0], [1, 0], [0, 1], [1, 0]]), LABELS),
)
DATA = TrainingData("pets", num_images=32, hub_id="timm/oxford-iiit-pet", shots=16, seed=3, content_hash="0123abcd")


def squeezed(text):
    """The text without the padding of its tables."""
    return re.sub(" +", " ", text)


@pytest.fixture
def model():
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat|s", "dog"])
    model = get_peft_model(classifier, CLIPPromptTuningConfig(revision="abc123"))
    model.active_peft_config.base_model_name_or_path = "openai/clip-vit-base-patch16"
    model.hub_repo_id = "me/pets-prompts"
    return model


@pytest.fixture
def card_of(model, tmp_path):
    def card_of(**details):
        model.card_details = CardDetails(**details)
        model.save_pretrained(tmp_path)
        return ModelCard.load(tmp_path / "README.md")

    return card_of


def test_tells_what_was_trained_on_and_how(card_of):
    card = card_of(data=DATA, settings={"Epochs": 50})
    for said in (
        "- Base model: `openai/clip-vit-base-patch16` at revision `abc123`\n",
        "- Data set: `timm/oxford-iiit-pet`\n- Images: `32`\n- Shots: `16`\n- Seed: `3`\n",
        "- Hash of images and labels: `0123abcd`\n- Epochs: `50`\n",
        "Made with python ",
    ):
        assert said in card.text
    assert card.data.datasets == ["timm/oxford-iiit-pet"]


def test_shows_zero_shot_beside_tuned_for_all_and_for_each_class(card_of):
    text = squeezed(card_of(data=DATA, test_name="pets, test", comparison=COMPARISON).text)
    assert "### Results on `pets, test`" in text
    assert "| accuracy | 0.5000 | 0.7500 |\n" in text
    assert "| expected calibration error (lower is better) | " in text
    assert "2 of 4 images are classified correctly only with the adapter, and 1 only without it." in text
    assert "| `cat\\|s` | 2 | 0.50 | 1.00 |\n| `dog` | 2 | 0.50 | 0.50 |\n" in text


def test_results_are_metadata_that_the_hub_reads(card_of):
    results = card_of(data=DATA, test_name="test", comparison=COMPARISON).data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    found = {(result.metric_type, result.metric_name): result.metric_value for result in results}
    assert found["accuracy", "accuracy, tuned"] == 0.75 and found["accuracy", "accuracy, zero-shot"] == 0.5
    assert {(result.dataset_type, result.dataset_name, result.dataset_split) for result in results} == {
        ("timm/oxford-iiit-pet", "pets", "test")
    }
    assert {result.task_type for result in results} == {"image-classification"}


def test_results_on_other_data_stay_and_those_on_the_same_are_replaced(card_of):
    card_of(test_name="pets", comparison=COMPARISON)
    card_of(test_name="cars", comparison=COMPARISON)
    card = card_of(test_name="pets", comparison=COMPARISON)
    counts = [sum(result.dataset_name == name for result in card.data.eval_results) for name in ("pets", "cars")]
    assert counts == [2 * len(COMPARISON.tuned.metrics)] * 2
    assert card.data.model_name == "me/pets-prompts"
    assert card.text.count("### Results on") == 1


def test_names_the_words_next_to_the_vectors_and_how_much_that_means(card_of, model):
    text = squeezed(card_of(words=nearest_words(model, num_words=2)).text)
    assert "| 2 | `photo` | `photo` 0.00, " in text
    assert "0 of 4 vectors are farther than that from every word" in text


def test_without_details_there_is_no_section(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "### " not in card.text.split("<!-- clip_prompt_peft: end -->")[0] and not card.data.eval_results


def test_a_folder_as_base_model_has_no_revision(model, tmp_path):
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "tiny_clip")
    model.save_pretrained(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    assert (
        "- Base model: `tiny_clip`, a folder (not on the Hub: pass `base_model_name_or_path` when loading)\n" in text
    )
    assert "abc123" not in text
