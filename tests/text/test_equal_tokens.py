"""Class names that a tokenizer makes the same tokens of."""

import unicodedata
import warnings

import pytest
import torch
from conftest import TINY_CLIP
from families import FAMILIES
from peft import get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("pair", [("Turkey", "turkey"), ("cat", " cat"), ("cat", "cat  "), (NFC, NFD)])
def test_a_warning_names_the_pair(pair):
    with pytest.warns(UserWarning, match="the same tokens") as caught:
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=[*pair, "dog"])
    (message,) = {str(warning.message) for warning in caught if "same tokens" in str(warning.message)}
    assert all(repr(name) in message for name in pair) and "dog" not in message
    embeds = model.eval().get_class_embeds()
    torch.testing.assert_close(embeds[0], embeds[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_words_in_every_family(name):
    family = FAMILIES[name]
    with pytest.warns(UserWarning, match="same tokens of the class names '\u2603' and '\u2602'"):
        family.classifier(class_names=["\u2603", "\u2602", "cat"])


def test_it_is_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["Cat", "cat"])
        model = get_peft_model(model, CLIPPromptTuningConfig())
        for _ in range(3):
            model(pixel_values=torch.zeros(2, 3, 48, 48), labels=torch.tensor([0, 1])).loss.backward()
    assert sum("same tokens" in str(warning.message) for warning in caught) == 1


def test_vectors_for_each_class_tell_them_apart():
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "dog"])
    model = get_peft_model(model, CLIPPromptTuningConfig(class_specific=True, class_names=["Cat", "cat"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pixel_values=torch.zeros(2, 3, 48, 48))


def test_names_that_differ_are_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=[f"kind {i}" for i in range(2000)])
