"""Class names that CLIP cannot read as words are told where they come from: data sets, classifiers, new adapters."""

import functools
import json
import warnings
from importlib import resources

import pytest
from adapters import tuned
from conftest import TINY_CLIP
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import get_peft_model
from PIL import Image as PILImage

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.data import class_names_of, load_image_dataset


NO_WORDS = [
    ["0.0", "1.0", "2.0", "3.0"],
    ["1", "2"],
    ["-3", "+4"],
    ["1e5", "cat"],
    ["cat", "nan"],
    ["NaN", "None"],
    ["<NA>", "n/a"],
    ["class_0", "class_1"],
    ["Class 0", "Class 1"],
    ["label1", "label2"],
    ["category-7", "dog"],
    ["cls_3", "id 4"],
    ["n01440764", "n01443537"],
    ["n02085620-Chihuahua", "n02085782 Japanese spaniel"],
    ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
    ["cat", "unknown"],
    ["cat", "UNLABELED"],
    ["True", "False"],
    ["yes", "no"],
    ["?", "cat"],
    ["c0", "c1", "c2"],
    ["S01", "S02"],
    ["9f86d081884c7d65", "cat"],
    ["123e4567-e89b-12d3-a456-426614174000", "cat"],
]
WORDS = [
    ["cat", "dog"],
    ["707-320", "737-200", "A300B4", "DC-3"],
    ["A310", "A320"],
    ["Boeing 747", "Audi A4"],
    ["2012 Tesla Model S", "3 cats"],
    ["t-shirt", "night", "nat king cole"],
    ["class of 1984", "unknown pleasures", "no entry"],
    ["\u732b", "\u72d7"],
    ["A", "B"],
    ["dad"],
]


def told(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if "look like numbers" in str(w.message)]


@pytest.fixture(scope="module")
def model():
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP)


@pytest.mark.parametrize("names", NO_WORDS, ids=str)
def test_they_are_told_once_with_the_first_three(model, names):
    (message,) = told(lambda: model.set_class_names(names))
    assert "CLIP reads class names as text" in message and "words" in message
    without = [name for name in names if name not in ("cat", "dog")]
    assert [name for name in names if repr(name) in message] == without[:3]
    assert ("and 1 more" in message) == (len(names) > 3)


@pytest.mark.parametrize("names", WORDS, ids=str)
def test_words_are_not(model, names):
    assert told(lambda: model.set_class_names(names)) == []


def test_names_of_the_known_datasets_are_words(model):
    known = json.loads(resources.files("clip_prompt_peft.data").joinpath("known_datasets.json").read_text())
    for dataset in known["datasets"].values():
        if names := list(dict.fromkeys(dataset.get("class_names", {}).values())):
            assert told(functools.partial(model.set_class_names, names)) == []


class TestWhereTheyComeFrom:
    NAMES = ["0", "1"]

    def test_from_pretrained_and_what_follows(self, pixel_values):
        def make():
            model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=self.NAMES)
            model = get_peft_model(model, CLIPPromptTuningConfig()).eval()
            model(pixel_values=pixel_values)
            with model.disable_adapter():
                model(pixel_values=pixel_values)

        assert len(told(make)) == 1

    def test_from_base(self, clip, tokenizer):
        assert len(told(lambda: CLIPForPromptClassification.from_base(clip, tokenizer, self.NAMES))) == 1

    @pytest.mark.parametrize("names", [None, ["cat", "dog"], ["0", "1"]])
    def test_a_new_adapter(self, names):
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
        found = told(lambda: get_peft_model(model, CLIPPromptTuningConfig(class_names=self.NAMES)))
        assert len(found) == (names != self.NAMES)

    def test_a_new_adapter_in_a_plain_model(self, clip):
        assert len(told(lambda: get_peft_model(clip, CLIPPromptTuningConfig(class_names=self.NAMES)))) == 1

    def test_an_adapter_alone(self, classifier, tmp_path):
        model = tuned(classifier)
        model.set_class_names(self.NAMES)
        model.save_pretrained(tmp_path)
        assert len(told(lambda: AutoPeftModelForPromptClassification.from_pretrained(tmp_path))) == 1

    @pytest.mark.parametrize("kind", ["text", "ClassLabel", "stream", "folders"])
    @pytest.mark.usefixtures("own_datasets_cache")
    def test_a_data_set_and_python_shows_the_same_text_once(self, kind, tmp_path, model, recwarn):
        names, picture = ["class_0", "class_1"], PILImage.new("RGB", (4, 4))
        if kind == "folders":
            for name in names:
                (tmp_path / "train" / name).mkdir(parents=True)
                picture.save(tmp_path / "train" / name / "a.png")
            source = {"folders": {"train": str(tmp_path / "train")}}
        else:
            label = Value("string") if kind == "text" else ClassLabel(names=names)
            rows = {"image": [picture] * 2, "label": names if kind == "text" else [0, 1]}
            Dataset.from_dict(rows, features=Features({"image": Image(), "label": label})).to_parquet(
                tmp_path / "train.parquet"
            )
            source = {"files": {"train": str(tmp_path / "train.parquet")}, "streaming": kind == "stream"}
        found = []
        of_data = told(lambda: found.append(load_image_dataset(**source)))
        of_model = told(lambda: model.set_class_names(class_names_of(found[0]["train"])))
        assert len(of_data) == 1 and of_data == of_model  # in one place, so it is printed once
