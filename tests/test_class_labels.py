"""Labels in the config are those of the classes in use, and an adapter that brings other classes says so."""

import copy
import pickle
import warnings

import pytest
import torch
from adapters import change_config, tuned
from conftest import CLASS_NAMES, TINY_CLIP
from peft import PeftModel, get_peft_model

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)


PETS, MEALS = ["cat", "dog"], ["cake", "pizza", "bread"]
UNNAMED = ["LABEL_0", "LABEL_1"]


def assert_labels(model, names):
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: label for label, name in enumerate(names)}
    assert model.config.num_labels == len(names)


def save_adapter(folder, names, base=None, **fields):
    base = base or CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
    tuned(base, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("pets"), PETS)


@pytest.fixture(scope="module")
def meals(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("meals"), MEALS)


class TestAtOnce:
    """Nothing is predicted in between."""

    def test_peft(self, classifier, pets, meals):
        model = PeftModel.from_pretrained(classifier, pets, adapter_name="pets")
        assert_labels(model, PETS)
        model.load_adapter(meals, "meals")
        assert_labels(model, PETS)
        model.set_adapter("meals")
        assert_labels(model, MEALS)
        with model.disable_adapter():
            assert_labels(model, CLASS_NAMES)
        assert_labels(model, MEALS)
        model.set_class_names(["cake", "tea"])
        assert_labels(model, ["cake", "tea"])
        model.delete_adapter("meals")
        assert_labels(model, PETS)
        model.delete_adapter("pets")
        assert_labels(model, ["cake", "tea"])  # set_class_names changes those of the classifier, too

    @pytest.mark.parametrize("how", ["unload", "disable_adapter_layers"])
    def test_without_the_adapter_they_are_the_models_own(self, classifier, pets, how):
        model = PeftModel.from_pretrained(classifier, pets)
        getattr(model, how)()
        assert_labels(classifier, CLASS_NAMES)

    def test_merging(self, classifier, pets, meals):
        model = PeftModel.from_pretrained(classifier, pets, adapter_name="pets")
        model.load_adapter(meals, "meals")
        model.merge_adapter(["meals"])
        assert_labels(model, MEALS)
        model.unmerge_adapter()
        assert_labels(model, PETS)
        assert_labels(model.merge_and_unload(), PETS)

    def test_transformers(self, classifier, pets, meals):
        classifier.load_adapter(str(pets), "pets")
        assert_labels(classifier, PETS)
        classifier.load_adapter(str(meals), "meals")
        assert_labels(classifier, MEALS)
        classifier.set_adapter("pets")
        assert_labels(classifier, PETS)
        classifier.disable_adapters()
        assert_labels(classifier, CLASS_NAMES)
        classifier.enable_adapters()
        assert_labels(classifier, PETS)
        classifier.delete_adapter("pets")
        classifier.set_adapter("meals")
        assert_labels(classifier, MEALS)
        classifier.delete_adapter("meals")
        assert_labels(classifier, CLASS_NAMES)

    def test_new_adapters(self, classifier):
        model = get_peft_model(classifier, CLIPPromptTuningConfig(class_names=PETS))
        assert_labels(model, PETS)
        model.add_adapter("meals", CLIPPromptTuningConfig(class_names=MEALS))
        assert_labels(model, PETS)

    @pytest.mark.parametrize("load", [CLIPForPromptClassification, AutoModelForPromptClassification])
    def test_from_an_adapter_alone(self, pets, load):
        assert_labels(load.from_pretrained(pets), PETS)
        assert_labels(AutoPeftModelForPromptClassification.from_pretrained(pets), PETS)
        assert_labels(load.from_pretrained(pets, class_names=MEALS), MEALS)

    def test_a_classifier_without_classes(self, pets):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
        model = PeftModel.from_pretrained(classifier, pets)
        assert_labels(model, PETS)
        with model.disable_adapter():
            assert_labels(model, UNNAMED)
        model.unload()
        assert_labels(classifier, UNNAMED)

    @pytest.mark.parametrize("make_twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, classifier, pets, make_twin):
        model = PeftModel.from_pretrained(classifier, pets)
        twin = make_twin(model)
        twin.disable_adapter_layers()
        assert_labels(twin, CLASS_NAMES)
        assert_labels(model, PETS)

    def test_a_classifier_around_a_model_that_holds_an_adapter(self, clip, pets):
        clip.load_adapter(str(pets))
        before = copy.deepcopy(clip.config.id2label)
        classifier = CLIPForPromptClassification.from_base(clip)
        assert_labels(classifier, PETS)
        classifier.disable_adapters()
        assert_labels(classifier, PETS)  # the only names it was ever given
        assert clip.config.id2label == before

    def test_a_plain_model_has_no_labels(self, clip, pets):
        before = copy.deepcopy(clip.config.id2label)
        PeftModel.from_pretrained(clip, pets)
        assert clip.config.id2label == before

    def test_a_mixed_batch_leaves_them_as_they_were(self, classifier, pets, meals, pixel_values):
        model = PeftModel.from_pretrained(classifier, pets, adapter_name="pets").eval()
        model.load_adapter(meals, "meals")
        model(pixel_values=pixel_values, adapter_names=["meals", "__base__", "pets"])
        assert_labels(model, PETS)


def told(load):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught if "class names" in str(w.message) or "problem_type" in str(w.message)]


WAYS = {
    "peft": lambda model, adapter: PeftModel.from_pretrained(model, adapter),
    "transformers": lambda model, adapter: model.load_adapter(str(adapter)),
}


@pytest.mark.parametrize("way", WAYS)
class TestOtherClasses:
    def test_in_another_order(self, way, pets):
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=PETS[::-1])
        (message,) = told(lambda: WAYS[way](model, pets))
        assert "brings the class names of the model in another order: label 0 is 'cat', not 'dog'" in message
        assert "model.set_class_names([...])" in message
        model.set_class_names(PETS[::-1])
        assert_labels(model, PETS[::-1])

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["cat", "owl"], "1 new (['dog']), 1 missing (['owl'])."),
            (["cat"], "1 new (['dog']); it has 2 classes instead of 1."),
            (["cat", "dog", "owl"], "1 missing (['owl']); it has 2 classes instead of 3."),
            (["Cat", "dog"], "1 new (['cat']), 1 missing (['Cat'])."),
        ],
    )
    def test_of_other_names(self, way, pets, names, said):
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
        (message,) = told(lambda: WAYS[way](model, pets))
        assert f"brings class names of its own in place of the model's: {said} While" in message

    def test_of_vectors_for_each_class_say_how_to_go_back(self, way, tmp_path):
        folder = save_adapter(tmp_path, PETS, class_specific=True)
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=MEALS)
        (message,) = told(lambda: WAYS[way](model, folder))
        assert "with model.disable_adapter() the model has its own again" in message

    @pytest.mark.parametrize("names", [PETS, None])
    def test_the_same_or_none_are_not_told(self, way, pets, names):
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
        assert told(lambda: WAYS[way](model, pets)) == []

    def test_another_kind_of_labels_is_told(self, way, pets, tmp_path):
        base = CLIPForPromptClassification.from_pretrained(
            TINY_CLIP, class_names=PETS, problem_type="multi_label_classification"
        )
        folder = save_adapter(tmp_path, PETS, base)
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=PETS)
        (message,) = told(lambda: WAYS[way](model, folder))
        assert "set model.config.problem_type = 'multi_label_classification'" in message


def test_names_that_set_class_names_gave_are_compared_too(pets):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    model.set_class_names(MEALS)
    assert len(told(lambda: PeftModel.from_pretrained(model, pets))) == 1


def test_an_adapter_beside_another_takes_the_place_of_nothing(classifier, pets, meals):
    model = AutoPeftModelForPromptClassification.from_pretrained(pets)
    assert told(lambda: model.load_adapter(meals, "meals")) == []
    assert told(lambda: model.set_adapter("meals")) == []


def test_a_new_adapter_has_the_classes_that_it_is_given(classifier):
    assert told(lambda: get_peft_model(classifier, CLIPPromptTuningConfig(class_names=PETS))) == []


def test_names_given_beside_an_adapter_are_used(pets):
    assert told(lambda: CLIPForPromptClassification.from_pretrained(pets, class_names=MEALS)) == []


class TestABaseModelWithClasses:
    """A saved classifier under an adapter of other classes, which come first."""

    @pytest.fixture
    def adapter(self, pets, classifier, tmp_path):
        classifier.save_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(CLIPForPromptClassification.from_pretrained(tmp_path / "base"), pets)
        model.save_pretrained(tmp_path / "adapter")
        change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
        return tmp_path / "adapter"

    @pytest.mark.parametrize(
        "load", [CLIPForPromptClassification.from_pretrained, AutoPeftModelForPromptClassification.from_pretrained]
    )
    def test_the_adapters_are_used(self, adapter, load, pixel_values):
        found = []
        assert told(lambda: found.append(load(adapter).eval())) == []
        assert found[0].class_names == PETS
        assert_labels(found[0], PETS)
        with torch.no_grad():
            assert found[0](pixel_values=pixel_values).logits.shape == (3, 2)
