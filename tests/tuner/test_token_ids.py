"""An adapter tells whether a tokenizer makes the token ids of its texts that the tokenizer of its training made."""

import json
import re
import shutil
import warnings

import pytest
from adapters import as_if_trained, change_config, tuned
from conftest import CLASS_NAMES, TINY_CLIP
from families import FAMILIES
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, CLIPModel

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    build_class_prompts,
)


def told(load):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught if "another tokenizer" in str(w.message)]


def with_swapped_ids(folder, *words):
    """Copies the tiny CLIP, with a tokenizer of the same size in which two tokens have each other's number."""
    shutil.copytree(TINY_CLIP, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = (f"{word}</w>" for word in words)
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture
def swapped(tmp_path):
    return with_swapped_ids(tmp_path / "swapped", "food", "vehicle")


WAYS = {
    "auto": lambda adapter, base: AutoPeftModelForPromptClassification.from_pretrained(
        adapter, base_model_name_or_path=str(base)
    ),
    "peft": lambda adapter, base: PeftModel.from_pretrained(
        CLIPForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES), adapter
    ),
    "transformers": lambda adapter, base: CLIPForPromptClassification.from_pretrained(
        base, class_names=CLASS_NAMES
    ).load_adapter(str(adapter)),
    "tokenizer": lambda adapter, base: AutoPeftModelForPromptClassification.from_pretrained(
        adapter, tokenizer=AutoTokenizer.from_pretrained(base)
    ),
    "without names": lambda adapter, base: (
        PeftModel.from_pretrained(CLIPForPromptClassification.from_pretrained(base), adapter).class_prompts
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ids_are_told_once_with_the_first_text_and_both(adapter, swapped, tokenizer, way):
    (message,) = told(lambda: WAYS[way](adapter, swapped))
    ids = tokenizer("a photo of a food.")["input_ids"]
    now = AutoTokenizer.from_pretrained(swapped)("a photo of a food.")["input_ids"]
    assert ids != now
    assert f"'a photo of a food.' had the token ids {ids}, and has {now} now, and 1 more texts have others" in message
    if way != "transformers":  # which does not tell an adapter where it comes from
        assert repr(str(adapter)) in message


@pytest.mark.parametrize("way", WAYS)
def test_the_same_ids_are_not(adapter, way):
    assert told(lambda: WAYS[way](adapter, TINY_CLIP)) == []


def test_an_adapter_as_a_whole_classifier_keeps_its_record_until_it_is_compared(adapter, swapped):
    change_config(adapter, base_model_name_or_path=str(swapped))
    assert len(told(lambda: CLIPForPromptClassification.from_pretrained(adapter))) == 1


def test_a_tokenizer_that_makes_other_ids_of_other_words_only_is_the_same(adapter, tmp_path):
    other = with_swapped_ids(tmp_path / "other", "cat", "dog")
    assert told(lambda: WAYS["auto"](adapter, other)) == []


def test_a_model_that_is_used_further_tells_nothing_again(adapter, swapped, pixel_values):
    model = WAYS["auto"](adapter, swapped).eval()

    def use():
        model(pixel_values=pixel_values)
        with model.disable_adapter():
            model(pixel_values=pixel_values)
        model(pixel_values=pixel_values)

    assert told(use) == []


def test_new_class_names_are_recorded_with_their_ids(classifier, tmp_path):
    model = tuned(classifier)
    model.set_class_names(["cat", "dog"])
    model.save_pretrained(tmp_path / "adapter")
    (message,) = told(lambda: WAYS["auto"](tmp_path / "adapter", with_swapped_ids(tmp_path / "s", "cat", "sun")))
    assert "'a photo of a cat.' had" in message
    assert told(lambda: WAYS["auto"](tmp_path / "adapter", with_swapped_ids(tmp_path / "t", "food", "sun"))) == []


def test_texts_that_were_changed_by_hand_are_not_compared(adapter, swapped):
    change_config(adapter, class_names=["animal", "plant", "meal", "vehicle"])
    assert told(lambda: WAYS["auto"](adapter, swapped)) == []


def test_adapters_without_a_record_load(adapter, swapped):
    change_config(adapter, tokenizer_fingerprint=None)
    assert told(lambda: WAYS["auto"](adapter, swapped)) == []


class TestWithoutClassNames:
    """A plain model does not know its tokenizer, so what makes its prompts compares."""

    @pytest.fixture
    def adapter(self, clip, tmp_path):
        tuned(clip).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_a_classifier_compares_the_template_with_a_word(self, adapter, tmp_path):
        other = with_swapped_ids(tmp_path / "other", "cat", "dog")
        model = CLIPForPromptClassification.from_pretrained(other)
        model.tokenizer = AutoTokenizer.from_pretrained(other)
        (message,) = told(lambda: PeftModel.from_pretrained(model, adapter))
        assert "'a photo of a cat.' had" in message

    def test_a_plain_model_with_a_tokenizer_compares_too(self, adapter, clip, tmp_path):
        clip.tokenizer = AutoTokenizer.from_pretrained(with_swapped_ids(tmp_path / "other", "cat", "dog"))
        assert told(lambda: PeftModel.from_pretrained(clip, adapter))

    def test_prompts_for_a_plain_model_compare_once(self, adapter, clip, tokenizer, tmp_path):
        model = PeftModel.from_pretrained(clip, adapter)
        other = AutoTokenizer.from_pretrained(with_swapped_ids(tmp_path / "other", "cat", "dog"))

        def prompts(tokenizer):
            config = model.active_peft_config
            return told(lambda: build_class_prompts(["sun"], config.padded_template, tokenizer, 77, config))

        assert prompts(tokenizer) == []
        assert len(prompts(other)) == 1
        assert prompts(other) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_in_each_family(name, tmp_path):
    family = FAMILIES[name]
    as_if_trained(get_peft_model(family.classifier(), CLIPPromptTuningConfig())).save_pretrained(tmp_path)
    assert told(lambda: PeftModel.from_pretrained(family.classifier(), tmp_path)) == []
    (record,) = re.findall(r'"ids": "([^"]+)"', (tmp_path / "adapter_config.json").read_text())
    assert len(record) < 400


def test_it_is_short_and_of_many_classes_holds_a_checksum(tmp_path):
    names = [f"number {i}" for i in range(1200)]
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
    get_peft_model(model, CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(json.dumps(config["tokenizer_fingerprint"])) < len(json.dumps(names)) / 2
    config["tokenizer_fingerprint"]["checksum"] = "0" * 8  # as if one of the last texts had others
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (message,) = told(lambda: WAYS["auto"](tmp_path, TINY_CLIP))
    assert "one of the texts after the first 1000 has other token ids now" in message


@pytest.mark.parametrize(
    "record",
    [
        {"version": 1},
        {"texts": "a", "checksum": "b", "ids": "?"},
        {"texts": "a", "checksum": "b", "ids": "AAAA"},
        {"texts": 1, "checksum": None, "ids": "eJz7/x8AAgAA"},
        {"texts": "a", "checksum": "b", "ids": 7},
        7,
    ],
)
def test_a_damaged_record_is_refused(classifier, adapter, record):
    change_config(adapter, tokenizer_fingerprint=record)
    with pytest.raises(ValueError, match="tokenizer_fingerprint"):
        PeftModel.from_pretrained(classifier, adapter)


def test_loading_into_a_plain_model_needs_no_tokenizer(adapter, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    CLIPModel.from_pretrained(TINY_CLIP).save_pretrained(folder)
    PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), adapter)
