"""Sets of classes with a coverage: the guarantee, what they refuse, and where their scores go."""

import math

import numpy as np
import pytest
import torch
from adapters import as_if_trained, change_config, tuned
from conftest import EMOJI, TINY_CLIP, slow_param
from families import FAMILIES, Case
from peft import LoraConfig, PeftModel, get_peft_model

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)
from clip_prompt_peft.data import cache_image_embeds, class_names_of, load_image_dataset
from clip_prompt_peft.evaluation.conformal import ConformalClassifier
from clip_prompt_peft.evaluation.conformal_scores import (
    MAX_SCORES,
    ConformalScores,
    class_scores,
    kept_scores,
    num_below,
    num_needed,
)
from clip_prompt_peft.evaluation.metrics import softmax


WAYS = [("lac", False), ("aps", False), ("aps", True)]


def scores_of(probabilities, labels, method="lac", randomized=False, draws=None):
    of_label = class_scores(probabilities, method, draws)[np.arange(len(labels)), labels]
    return ConformalScores(method, randomized, len(labels), kept_scores(of_label), None, "", [0.0])


def drawn(random, num_images, num_classes=8):
    """Probabilities of a model that is quite wrong, and labels."""
    logits = 2 * random.normal(size=(num_images, num_classes))
    labels = (softmax(logits).cumsum(axis=1) < random.random((num_images, 1))).sum(axis=1).clip(0, num_classes - 1)
    return softmax(3 * logits + random.normal(size=logits.shape)), labels


class TestCoverage:
    @pytest.mark.parametrize("coverage", [0.8, 0.9])
    @pytest.mark.parametrize(("method", "randomized"), WAYS)
    def test_of_200_random_splits_is_the_one_asked_for(self, method, randomized, coverage):
        n, m, num_splits = 60, 40, 200
        random = np.random.default_rng(1)
        covered = []
        for _ in range(num_splits):
            probabilities, labels = drawn(random, n + m)
            draws = random.random(n + m) if randomized else None
            scores = scores_of(probabilities[:n], labels[:n], method, randomized, None if draws is None else draws[:n])
            in_set = scores.in_set(probabilities[n:], coverage, None if draws is None else draws[n:])
            covered.append(in_set[np.arange(m), labels[n:]].mean())
        # Over validation and test images, coverage is beta-binomial with the mean k / (n + 1), if scores are distinct.
        expected = num_below(n, coverage) / (n + 1)
        of_a_split = expected * (1 - expected) * (1 / (n + 2) + 1 / m)
        margin = 4 * math.sqrt(of_a_split / num_splits)
        assert np.mean(covered) > coverage - margin
        if method == "lac" or randomized:  # plain aps has ties at 0, where more is covered
            assert abs(np.mean(covered) - expected) < margin

    @pytest.mark.parametrize("number", [MAX_SCORES + 1, 2 * MAX_SCORES - 1, 25_000])
    def test_is_not_lost_where_only_some_scores_are_kept(self, number):
        values = np.random.default_rng(0).random(number)
        kept = ConformalScores("lac", False, number, kept_scores(values), None, "", [0.0])
        assert len(kept.scores) == MAX_SCORES
        for coverage in (0.5, 0.9, 0.999, 0.9999):
            rank = num_below(number, coverage)
            expected = np.sort(values)[rank - 1] if rank <= number else math.inf
            assert kept.threshold(coverage) >= expected
            if coverage < 0.99:
                assert kept.threshold(coverage) < expected + 0.005


class TestScores:
    def test_can_be_counted_by_hand(self):
        probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
        assert class_scores(probabilities, "lac") == pytest.approx(1 - probabilities)
        assert class_scores(probabilities, "aps") == pytest.approx(np.array([[0, 0.5, 0.8], [0.8, 0.9, 0]]))
        randomized = class_scores(probabilities, "aps", np.array([0.5, 1.0]))
        assert randomized == pytest.approx(np.array([[0.25, 0.65, 0.9], [0.9, 1.0, 0.8]]))

    def test_bound_the_sets(self):
        # 9 validation images whose label has the probability 0.9, 0.8, ... 0.1
        probabilities = np.array([[p, 1 - p] for p in np.arange(1, 10) / 10])
        scores = scores_of(probabilities, np.zeros(9, int))
        assert [scores.threshold(coverage) for coverage in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9])
        assert scores.in_set(np.array([[0.55, 0.45], [0.99, 0.01]]), 0.5).tolist() == [[True, False], [True, False]]
        assert scores.in_set(np.array([[0.5, 0.3, 0.2]]), 0.1).tolist() == [[False] * 3]  # "I don't know"

    def test_of_too_few_images_give_the_full_set_and_say_so(self):
        scores = scores_of(np.full((9, 3), 1 / 3), np.zeros(9, int))
        assert scores.threshold(0.9) < math.inf and scores.too_few(0.9) is None
        assert scores.threshold(0.91) == math.inf and scores.in_set(np.eye(3), 0.91).all()
        assert "after 9 validation images" in scores.too_few(0.95) and "at least 19 images" in scores.too_few(0.95)

    @pytest.mark.parametrize(("coverage", "number"), [(0.5, 1), (0.7, 3), (0.9, 9), (0.95, 19), (0.99, 99)])
    def test_need_a_number_of_images(self, coverage, number):
        assert num_needed(coverage) == number

    @pytest.mark.parametrize(("method", "randomized"), WAYS)
    def test_never_give_empty_sets_with_plain_aps(self, method, randomized):
        random = np.random.default_rng(0)
        probabilities, labels = drawn(random, 400)
        scores = scores_of(probabilities[:200], labels[:200], method, randomized, random.random(200))
        sizes = scores.in_set(probabilities[200:], 0.2, random.random(200)).sum(axis=1)
        assert (sizes.min() == 0) == scores.may_be_empty == (method == "lac" or randomized)

    @pytest.mark.parametrize(("coverage", "size"), [(0.8, 468), (0.9, 704)])
    def test_give_the_sets_of_mapie(self, coverage, size):
        # mapie 1.6.0, SplitConformalClassifier(model, coverage, prefit=True, conformity_score="lac")
        probabilities, labels = drawn(np.random.default_rng(0), 300)
        in_set = scores_of(probabilities[:100], labels[:100]).in_set(probabilities[100:], coverage)
        assert in_set.sum() == size


@pytest.fixture(scope="module")
def images():
    return load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(0, 240, 4))


@pytest.fixture(scope="module")
def embedded(images, image_processor):
    return cache_image_embeds(images, CLIPForPromptClassification.from_pretrained(TINY_CLIP), image_processor)


@pytest.fixture
def model(images):
    return tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(images)))


class TestOfAModel:
    def test_sets_are_the_same_from_images_pixels_and_embeddings(self, model, images, embedded, image_processor):
        conformal = ConformalClassifier.fit(model, images.select(range(40)))
        rows = list(range(40, 60))
        pictures = images.select(rows)["image"][:]
        expected = conformal.predict_set(pictures, coverage=0.8)
        pixels = image_processor(pictures, return_tensors="pt").pixel_values
        for inputs in ({"pixel_values": pixels}, {"image_embeds": embedded[rows]["image_embeds"]}):
            assert conformal.predict_set(coverage=0.8, **inputs).names == expected.names
        assert expected.in_set.shape == (20, 12) and expected.sizes.tolist() == [
            len(names) for names in expected.names
        ]
        best = [model.class_names[label] for label in expected.probabilities.argmax(axis=1)]
        assert [names[0] for names in expected.names] == best  # the most probable first
        assert expected.is_unsure(3).tolist() == [size > 3 for size in expected.sizes]

    @pytest.mark.parametrize(("method", "randomized"), WAYS)
    def test_test_images_are_covered(self, model, embedded, method, randomized):
        conformal = ConformalClassifier.fit(
            model, embedded.select(range(0, 60, 2)), method=method, randomized=randomized
        )
        rows = conformal.evaluate(embedded.select(range(1, 60, 2)))
        assert [coverage for coverage, *_ in rows] == [0.8, 0.9, 0.95]
        for coverage, share, size, empty in rows:
            assert share > coverage - 0.25 and 0 < size <= 12 and empty <= 0.2

    def test_randomized_sets_repeat_with_their_seed(self, model, embedded):
        ConformalClassifier.fit(model, embedded, randomized=True)
        inputs = {"image_embeds": embedded[:]["image_embeds"], "coverage": 0.7}
        first, again, other = (ConformalClassifier(model, seed=seed).predict_set(**inputs) for seed in (1, 1, 2))
        assert (first.in_set == again.in_set).all() and (first.in_set != other.in_set).any()

    def test_too_few_images_are_told(self, model, embedded):
        conformal = ConformalClassifier.fit(model, embedded.select(range(8)))
        with pytest.warns(UserWarning, match="after 8 validation images, so every set holds all classes"):
            sets = conformal.predict_set(coverage=0.9, image_embeds=embedded[:3]["image_embeds"])
        assert sets.in_set.all()


class TestGoWith:
    @pytest.fixture
    def embeds(self, embedded):
        return {"image_embeds": embedded[:20]["image_embeds"], "coverage": 0.8}

    @pytest.fixture
    def fitted(self, model, embedded, embeds):
        model.set_temperature(2.0)
        return ConformalClassifier.fit(model, embedded.select(range(20, 60))).predict_set(**embeds).names

    def test_the_files_of_an_adapter(self, model, fitted, embeds, tmp_path):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").stat().st_size < 10_000
        loaded = AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
        assert ConformalClassifier(loaded).predict_set(**embeds).names == fitted
        half = AutoPeftModelForPromptClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        ConformalClassifier(half).predict_set(**embeds)

    def test_a_merged_classifier(self, model, fitted, embeds, tmp_path):
        model.merge_and_unload().save_pretrained(tmp_path)
        loaded = AutoModelForPromptClassification.from_pretrained(tmp_path)
        assert ConformalClassifier(loaded).predict_set(**embeds).names == fitted

    def test_their_adapter_when_adapters_are_switched(self, model, fitted, embeds, embedded):
        conformal = ConformalClassifier(model)
        model.add_adapter("other", CLIPPromptTuningConfig())
        model.set_adapter("other")
        with pytest.raises(ValueError, match="adapter that is in effect now has no scores"):
            conformal.predict_set(**embeds)
        with pytest.raises(ValueError, match="has no scores of validation images"), model.disable_adapter():
            ConformalClassifier(model)
        ConformalClassifier.fit(model, embedded)
        model.set_adapter("default")
        assert conformal.predict_set(**embeds).names == fitted

    def test_a_zero_shot_classifier(self, images, embedded, embeds, tmp_path):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(images))
        expected = ConformalClassifier.fit(classifier, embedded).predict_set(**embeds).names
        classifier.save_pretrained(tmp_path)
        loaded = AutoModelForPromptClassification.from_pretrained(tmp_path)
        assert ConformalClassifier(loaded).predict_set(**embeds).names == expected

    @pytest.mark.parametrize("fields", [{"image_conditioned": True}, {"num_vision_virtual_tokens": 2}])
    def test_adapters_of_every_kind(self, images, fields, tmp_path):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(images))
        model = as_if_trained(get_peft_model(classifier, CLIPPromptTuningConfig(**fields)).eval())
        pictures = images.select(range(5))["image"][:]
        expected = ConformalClassifier.fit(model, images.select(range(20))).predict_set(pictures, 0.8).names
        model.save_pretrained(tmp_path)
        loaded = AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
        assert ConformalClassifier(loaded).predict_set(pictures, 0.8).names == expected


@pytest.mark.parametrize("family", [name if name in ("Siglip", "Siglip2") else slow_param(name) for name in FAMILIES])
def test_every_family_is_calibrated_and_loaded_again(family, tmp_path):
    case = Case(family)
    model = case.prompted()
    raw = model(**case.images).logits.detach()
    model.set_temperature(2.0)
    logits, labels = torch.randn(30, 4), torch.randint(0, 4, (30,))
    expected = ConformalClassifier.fit(model, logits=logits, labels=labels).predict_set(coverage=0.7, **case.images)
    assert np.allclose(expected.probabilities, (raw / 2).softmax(-1).numpy(), atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.classifier(), tmp_path)
    sets = ConformalClassifier(loaded).predict_set(coverage=0.7, **case.images)
    assert loaded.temperature == 2.0 and sets.names == expected.names


class TestAreRefused:
    @pytest.fixture
    def conformal(self, model, embedded):
        return ConformalClassifier.fit(model, embedded)

    @pytest.fixture
    def embeds(self, embedded):
        return embedded[:2]["image_embeds"]

    def test_for_other_classes(self, conformal, model, embeds):
        for names in (model.class_names[::-1], ["cat", "dog"]):
            model.set_class_names(names)
            with pytest.raises(ValueError, match="calibrated for other class names, or another order of them"):
                conformal.predict_set(image_embeds=embeds)

    def test_with_another_temperature(self, conformal, model, embeds):
        model.set_temperature(1.5)
        with pytest.raises(ValueError, match="calibrated with the temperature 1, and the model has 1.5 now"):
            conformal.predict_set(image_embeds=embeds)
        model.set_temperature(None)
        conformal.predict_set(image_embeds=embeds)

    def test_after_further_training(self, conformal, model, embeds):
        as_if_trained(model, std=0.02)
        with pytest.raises(ValueError, match="calibrated for another model: another adapter, further training"):
            conformal.predict_set(image_embeds=embeds)

    def test_of_another_adapter_whose_scores_were_copied(self, conformal, model):
        other = tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=model.class_names), seed=1)
        other.set_conformal_scores(model.conformal_scores)
        with pytest.raises(ValueError, match="calibrated for another model"):
            ConformalClassifier(other)

    def test_with_lora_that_came_later(self, images, embedded, embeds):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(images))
        conformal = ConformalClassifier.fit(classifier, embedded)
        classifier.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        classifier.eval()
        with pytest.raises(ValueError, match="calibrated for another model"):
            conformal.predict_set(image_embeds=embeds)

    @pytest.mark.parametrize("coverage", [0, 1, -0.1, 1.5, 90, float("nan"), "0.9", True, None])
    def test_with_a_coverage_that_is_none(self, conformal, embeds, coverage):
        with pytest.raises(ValueError, match="coverage must be a number between 0 and 1, such as 0.9"):
            conformal.predict_set(image_embeds=embeds, coverage=coverage)

    def test_without_images_or_with_one(self, conformal, images, embeds):
        for given in ({}, {"images": images["image"][:1], "image_embeds": embeds}):
            with pytest.raises(ValueError, match="Give either images, or the inputs of the model"):
                conformal.predict_set(**given)
        with pytest.raises(ValueError, match="images must be a list"):
            conformal.predict_set(images[0]["image"])

    def test_in_ways_that_do_not_exist(self, model, embedded):
        with pytest.raises(ValueError, match="method must be one of 'lac', 'aps', got 'raps'"):
            ConformalClassifier.fit(model, embedded, method="raps")
        with pytest.raises(ValueError, match="True goes with method='aps' only"):
            ConformalClassifier.fit(model, embedded, method="lac", randomized=True)
        with pytest.raises(ValueError, match="There are no validation images"):
            ConformalClassifier.fit(model, embedded.select([]))

    def test_for_several_labels_per_image(self, classifier, embedded):
        classifier.config.problem_type = "multi_label_classification"
        with pytest.raises(ValueError, match="images of one class; this classifier has several"):
            ConformalClassifier.fit(classifier, embedded)

    @pytest.mark.parametrize(
        "changed",
        [
            {"scores": []},
            {"scores": [0.5] * 59 + [float("nan")]},
            {"scores": list(range(60))[::-1]},
            {"scores": "0.5"},
            {"num_images": 3},
            {"method": "raps"},
            {"probe": []},
            {"extra": 1},
        ],
    )
    def test_from_damaged_files(self, conformal, model, tmp_path, changed):
        model.save_pretrained(tmp_path)
        change_config(tmp_path, conformal_scores={**model.conformal_scores, **changed})
        loaded = AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="conformal_scores are damaged"):
            ConformalClassifier(loaded)
        change_config(tmp_path, conformal_scores=[1, 2])
        with pytest.raises(ValueError, match="conformal_scores must be a dictionary"):
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
