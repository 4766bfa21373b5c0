"""Temperature scaling: the fitted number, and where it goes with a classifier and its adapters."""

import copy
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapters import change_config, logits_of, tuned
from conftest import CLASS_NAMES, EMOJI, TINY_CLIP
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    PromptClassificationPipeline,
)
from clip_prompt_peft.data import cache_image_embeds, class_names_of, load_image_dataset, with_pixel_values
from clip_prompt_peft.evaluation.calibration import best_temperature, fit_temperature
from clip_prompt_peft.evaluation.metrics import ExpectedCalibrationError, calibration_error, softmax


def drawn(temperature, num_images=4000, num_classes=5, seed=0):
    """Logits, and labels that are drawn from the probabilities of the logits divided by the temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_images, num_classes)) * 4
    edges = softmax(logits / temperature).cumsum(axis=1)
    return logits, (random.random((num_images, 1)) > edges).sum(axis=1).clip(0, num_classes - 1)


class TestFit:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_finds_the_temperature_of_the_labels(self, temperature):
        fit = best_temperature(*drawn(temperature))
        assert abs(fit.temperature - temperature) < 3 * fit.standard_error < 0.2
        assert fit.nll_after <= fit.nll_before and not fit.is_at_bound

    def test_of_less_images_is_less_certain(self):
        many, few = best_temperature(*drawn(2.0)), best_temperature(*drawn(2.0, num_images=40))
        assert 5 < few.standard_error / many.standard_error < 20  # sqrt(100)

    def test_is_that_of_scikit_learn(self):
        logits, labels = drawn(2.0, num_images=300)
        inner = LogisticRegression().fit(logits, labels)
        scaled = CalibratedClassifierCV(FrozenEstimator(inner), method="temperature").fit(logits, labels)
        factor = scaled.calibrated_classifiers_[0].calibrators[0].beta_
        fit = best_temperature(inner.decision_function(logits), labels)
        assert fit.temperature == pytest.approx(1 / factor, rel=1e-3)

    def test_is_the_minimum(self):
        logits, labels = drawn(1.7, num_images=200)
        fit = best_temperature(logits, labels)

        def loss(temperature):
            return torch.nn.functional.cross_entropy(torch.tensor(logits) / temperature, torch.tensor(labels)).item()

        assert loss(fit.temperature) == pytest.approx(fit.nll_after, rel=1e-12)
        assert fit.nll_after < min(loss(fit.temperature * 1.001), loss(fit.temperature * 0.999))

    def test_does_not_depend_on_a_bias_of_all_logits(self):
        logits, labels = drawn(1.7, num_images=200)
        shifted = best_temperature(logits - 16.5, labels).temperature
        assert shifted == pytest.approx(best_temperature(logits, labels).temperature, rel=1e-9)

    def test_of_several_labels_divides_the_bias_too(self):
        random = np.random.default_rng(0)
        logits = random.normal(size=(3000, 4)) * 3 - 2
        labels = random.random(logits.shape) < 1 / (1 + np.exp(-logits / 2))
        fit = best_temperature(logits, labels, is_multi_label=True)
        assert abs(fit.temperature - 2) < 3 * fit.standard_error < 0.3
        assert fit.ece_after < fit.ece_before / 2
        assert best_temperature(logits + 5, labels, is_multi_label=True).nll_after > fit.nll_after

    @pytest.mark.parametrize("num_classes", [1, 2, 3])
    def test_a_classifier_that_is_always_right_ends_at_the_bound(self, num_classes):
        logits = np.eye(num_classes)[[0] * 5] * 3
        fit = best_temperature(logits, np.zeros(5, int))
        assert fit.is_at_bound and fit.temperature in (0.01, 100)

    def test_a_classifier_that_is_always_wrong_ends_at_the_other_bound(self):
        fit = best_temperature(np.eye(3)[[0, 1, 2]], np.array([1, 2, 0]))
        assert fit.is_at_bound and fit.temperature == 100

    @pytest.mark.parametrize("scale", [1e-3, 1, 300])
    def test_extreme_logits_give_finite_numbers(self, scale):
        logits, labels = drawn(1.0, num_images=100)
        fit = best_temperature(logits * scale, labels)
        assert all(np.isfinite([fit.temperature, fit.nll_before, fit.nll_after, fit.ece_after]))
        expected = scale * best_temperature(logits, labels).temperature
        assert fit.temperature == pytest.approx(min(max(expected, 0.01), 100))

    def test_lowers_the_calibration_error_of_an_overconfident_model(self):
        fit = best_temperature(*drawn(3.0))
        assert fit.ece_after < fit.ece_before / 3


# What torchmetrics 1.9.0 gives, MulticlassCalibrationError(5, n_bins=..., norm="l1").
def test_the_calibration_error_is_that_of_torchmetrics():
    probabilities = softmax(drawn(2.0, num_images=50, seed=3)[0])
    labels = drawn(2.0, num_images=50, seed=3)[1]
    expected = {10: 0.2466772496700287, 15: 0.2466772496700287}
    for num_bins, error in expected.items():
        found = calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, num_bins)
        assert found == pytest.approx(error, abs=1e-6)
    metric = ExpectedCalibrationError(keep_in_memory=True).compute(predictions=probabilities, references=labels)
    assert metric["expected_calibration_error"] == pytest.approx(expected[15], abs=1e-6)


@pytest.fixture(scope="module")
def images():
    return load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(0, 240, 4))


@pytest.fixture
def model(images):
    return tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(images)))


class TestOfAModel:
    def test_is_the_same_from_images_pixels_embeddings_and_logits(self, model, images, image_processor):
        pixels = with_pixel_values(images, image_processor)
        embedded = cache_image_embeds(images, model, image_processor)
        expected = fit_temperature(model, images).temperature
        logits = model(image_embeds=embedded["image_embeds"][:]).logits  # divided by the first one
        assert model.temperature == expected != 1
        for data in (pixels, embedded):
            assert fit_temperature(model, data, batch_size=7).temperature == pytest.approx(expected, rel=1e-5)
        again = fit_temperature(model, logits=logits, labels=embedded["labels"][:])
        assert again.temperature == pytest.approx(expected, rel=1e-5)

    def test_divides_logits_in_evaluation_and_never_the_loss_of_training(self, model, pixel_values):
        labels = torch.tensor([0, 3, 1])
        before, loss = logits_of(model, pixel_values), model.train()(pixel_values=pixel_values, labels=labels).loss
        model.eval().set_temperature(2.0)
        assert torch.equal(logits_of(model, pixel_values), before / 2)
        assert torch.equal(model.train()(pixel_values=pixel_values, labels=labels).loss, loss)
        of_evaluation = model.eval()(pixel_values=pixel_values, labels=labels).loss.item()
        assert of_evaluation == pytest.approx(torch.nn.functional.cross_entropy(before / 2, labels).item())

    def test_leaves_out_images_without_a_label(self, model):
        logits, labels = torch.randn(60, 12), torch.randint(0, 12, (60,))
        expected = fit_temperature(model, logits=logits[:50], labels=labels[:50]).temperature
        model.set_temperature(None)
        labels[50:] = -100
        assert fit_temperature(model, logits=logits, labels=labels).temperature == pytest.approx(expected)

    def test_few_images_and_a_bound_are_told(self, model, caplog):
        with caplog.at_level(logging.WARNING):
            fit_temperature(model, logits=torch.randn(20, 12), labels=torch.randint(0, 12, (20,)))
        assert "fitted on 20 images only, and may be off by about" in caplog.text or "end of its range" in caplog.text
        caplog.clear()
        model.set_temperature(None)
        with caplog.at_level(logging.WARNING):
            fit_temperature(model, logits=torch.eye(12), labels=torch.arange(12))
        assert "The temperature 0.01 is the end of its range" in caplog.text and "classified correctly" in caplog.text

    def test_an_ordinary_fit_is_silent(self, model, images, caplog):
        with caplog.at_level(logging.WARNING):
            fit_temperature(model, images)
        assert not caplog.records

    def test_rows_may_be_a_list_and_a_number_of_any_type(self, model, images, image_processor):
        rows = cache_image_embeds(images, model, image_processor)
        expected = fit_temperature(model, rows).temperature
        assert fit_temperature(model, [rows[i] for i in range(len(rows))]).temperature == pytest.approx(expected)
        model.set_temperature(np.float32(2))
        assert model.temperature == 2 and type(model.temperature) is float

    def test_validation_images_need_not_have_every_class(self, model, images):
        labels = np.array(images["label"][:])
        fit_temperature(model, images.select(np.flatnonzero(labels < 3)))
        assert model.temperature > 0


class TestIsRefused:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"logits": torch.zeros(0, 12), "labels": torch.zeros(0, dtype=int)}, "no validation images with a label"),
            ({"labels": torch.full((6,), -100)}, "no validation images with a label"),
            ({"labels": torch.tensor([0, 1, 2, 3, 4, 12])}, "Label 12 is out of range: the model has 12 classes"),
            ({"labels": torch.tensor([0, 1, 2, 3, 4, -1])}, "Often -1 stands for no label"),
            ({"labels": torch.zeros(5, dtype=int)}, "5 labels for 6 images"),
            ({"labels": torch.zeros(6, 12)}, "index of one class for each image"),
            ({"logits": torch.zeros(6, 11)}, r"logits must be \(N, 12\)"),
            ({"logits": torch.full((6, 12), torch.nan)}, "The logits of 6 of 6 validation images have NaN or Inf"),
            ({"logits": torch.zeros(6, 12).index_fill(0, torch.tensor(4), torch.inf)}, "such as those of image 4"),
            ({"labels": None}, "Give either a dataset of validation images, or their logits and labels"),
        ],
    )
    def test_with_the_reason(self, model, changed, message):
        given = {"logits": torch.randn(6, 12), "labels": torch.arange(6), **changed}
        with pytest.raises(ValueError, match=message):
            fit_temperature(model, **given)
        assert model.temperature is None

    def test_a_data_set_that_is_empty_has_no_images_or_no_labels(self, model, images):
        rows = Dataset.from_dict({"image_embeds": [[0.0] * 64]}).with_format("torch")
        for data, message in (
            (images.select([]), "There are no validation images"),
            (images.rename_column("image", "photo"), "must be in the column 'image'.*the data set has"),
            (rows, "have no labels"),
            (DatasetDict(validation=images), r"got DatasetDict of \['validation'\]; name one of them"),
        ):
            with pytest.raises(ValueError, match=message):
                fit_temperature(model, data)

    def test_classes_in_another_order(self, model, images, image_processor):
        model.set_class_names(model.class_names[::-1])
        unnamed = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
        for data in (images, cache_image_embeds(images, unnamed, image_processor)):
            with pytest.raises(ValueError, match="the same classes in another order"):
                fit_temperature(model, data)

    def test_a_model_that_is_no_classifier(self, clip):
        with pytest.raises(TypeError, match="fit_temperature needs a classifier .* got a CLIPModel"):
            fit_temperature(clip, logits=torch.zeros(1, 2), labels=torch.zeros(1, dtype=int))

    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e-9, "2", True])
    def test_a_temperature_that_is_none(self, model, value, tmp_path):
        with pytest.raises(ValueError, match="temperature must be a number from 0.001 to 1000"):
            model.set_temperature(value)
        with pytest.raises(ValueError, match="temperature must be a number from 0.001 to 1000"):
            CLIPPromptTuningConfig(temperature=value)
        model.save_pretrained(tmp_path)
        change_config(tmp_path, temperature=value)
        with pytest.raises(ValueError, match="temperature must be a number from 0.001 to 1000"):
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path)

    def test_of_several_adapters_together(self, classifier):
        model = tuned(classifier, num_virtual_tokens=2, temperature=2.0)
        model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2, start_idx=3))
        model.base_model.set_adapter(["default", "other"])
        assert model.temperature is None
        with pytest.raises(ValueError, match="2 adapters are in effect together"):
            model.set_temperature(2.0)


class TestGoesWith:
    @pytest.fixture
    def model(self, classifier):
        model = tuned(classifier)
        model.set_temperature(2.5)
        return model

    @pytest.mark.slow  # a process
    def test_the_files_of_an_adapter_in_a_new_process(self, model, pixel_values, tmp_path):
        model.save_pretrained(tmp_path)
        torch.save(pixel_values, tmp_path / "pixels.pt")
        program = (
            "import sys, torch; from clip_prompt_peft import AutoPeftModelForPromptClassification as Auto\n"
            "model = Auto.from_pretrained(sys.argv[1]); assert model.temperature == 2.5\n"
            "logits = model(pixel_values=torch.load(sys.argv[1] + '/pixels.pt')).logits\n"
            "torch.save(logits.detach(), sys.argv[1] + '/logits.pt')"
        )
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits_of(model, pixel_values), atol=1e-5)

    def test_copies(self, model, pixel_values):
        expected = logits_of(model, pixel_values)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.temperature == 2.5 and torch.equal(logits_of(copied, pixel_values), expected)
            copied.set_temperature(None)
        assert model.temperature == 2.5

    def test_its_adapter_when_adapters_are_switched_mixed_or_off(self, model, pixel_values):
        model.add_adapter("other", CLIPPromptTuningConfig())
        raw = logits_of(model, pixel_values) * 2.5
        model.set_adapter("other")
        assert model.temperature is None
        other = logits_of(model, pixel_values)
        model.set_temperature(4.0)
        with model.disable_adapter():
            assert model.temperature is None
            zero_shot = logits_of(model, pixel_values)
        model.set_adapter("default")
        assert model.temperature == 2.5
        mixed = model(pixel_values=pixel_values, adapter_names=["default", "other", "__base__"]).logits
        assert torch.allclose(mixed, torch.stack([raw[0] / 2.5, other[1] / 4, zero_shot[2]]), atol=1e-4)
        model.delete_adapter("other")
        assert model.temperature == 2.5

    def test_a_merged_classifier_and_its_files(self, model, pixel_values, tmp_path):
        expected = logits_of(model, pixel_values)
        model.merge_adapter()
        assert model.temperature == 2.5 and torch.allclose(logits_of(model, pixel_values), expected, atol=1e-4)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert merged.temperature == merged.config.logit_temperature == 2.5
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForPromptClassification.from_pretrained(tmp_path)
        assert torch.allclose(logits_of(loaded, pixel_values), expected, atol=1e-4)

    def test_no_adapter_that_is_unloaded_or_made_anew(self, model, pixel_values, tmp_path):
        config = model.active_peft_config
        base = model.unload()
        assert base.temperature is None and "logit_temperature" not in base.config.to_dict()
        assert get_peft_model(base, config).temperature is None  # its vectors are new
        # with weights of its own, it is that of the file
        other = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
        tuned(other, temperature=3.0).save_pretrained(tmp_path)
        assert AutoPeftModelForPromptClassification.from_pretrained(tmp_path).temperature == 3.0

    def test_a_zero_shot_classifier_and_not_with_the_adapters_on_it(self, classifier, pixel_values, tmp_path):
        raw = logits_of(classifier, pixel_values)
        classifier.set_temperature(2)
        classifier.save_pretrained(tmp_path)
        loaded = AutoModelForPromptClassification.from_pretrained(tmp_path)
        assert torch.allclose(logits_of(loaded, pixel_values), raw / 2, atol=1e-5)
        model = get_peft_model(loaded, CLIPPromptTuningConfig())
        assert model.temperature is None
        with model.disable_adapter():
            assert model.temperature == 2

    def test_a_plain_model_less_and_says_so(self, model, caplog):
        merged = model.merge_and_unload()
        with caplog.at_level(logging.WARNING):
            plain = merged.to_clip()
        assert "The temperature 2.5 of the classifier is left out" in caplog.text
        assert "logit_temperature" not in plain.config.to_dict() and merged.temperature == 2.5

    def test_the_merged_model_only_if_it_is_of_one_adapter(self, classifier):
        classifier.set_temperature(5.0)
        model = tuned(classifier, num_virtual_tokens=2, temperature=2.0)
        model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2, start_idx=3))
        assert model.merge_and_unload(adapter_names=["default", "other"]).temperature is None

    def test_adapters_of_transformers(self, model, pixel_values, tmp_path):
        model.save_pretrained(tmp_path)
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
        classifier.load_adapter(tmp_path)
        assert classifier.temperature == 2.5
        assert torch.allclose(logits_of(classifier, pixel_values), logits_of(model, pixel_values), atol=1e-5)
        classifier.disable_adapters()
        assert classifier.temperature is None

    def test_pipelines(self, model, image_processor, images):
        image = images[0]["image"]
        answers = {}
        for temperature in (2.5, None):
            model.set_temperature(temperature)
            answers[temperature] = PromptClassificationPipeline(model, image_processor=image_processor)(image)
        pixels = image_processor(image, return_tensors="pt").pixel_values
        expected = (logits_of(model, pixels)[0] / 2.5).softmax(-1).sort(descending=True).values
        scores = [answer["score"] for answer in answers[2.5]]
        assert scores == pytest.approx(expected.tolist(), abs=1e-5) and scores[0] < answers[None][0]["score"]

    def test_lora_in_memory_only_and_says_so(self, classifier, pixel_values, caplog):
        model = get_peft_model(classifier, LoraConfig(target_modules=["q_proj"])).eval()
        before = logits_of(model, pixel_values)
        with caplog.at_level(logging.WARNING):
            model.base_model.model.set_temperature(2.0)
        assert "the adapter is saved without it" in caplog.text
        assert torch.equal(logits_of(model, pixel_values), before / 2)
        assert model.merge_and_unload().temperature == 2.0


class TestOtherClasses:
    def test_remove_it_with_a_warning(self, classifier):
        classifier.set_temperature(3.0)
        model = tuned(classifier)
        model.set_temperature(2.0)
        with pytest.warns(UserWarning, match="was fitted for other class names, and is removed") as told:
            model.set_class_names(["cat", "dog"])
        assert {"3", "2"} == {str(one.message).split()[2] for one in told}
        assert model.temperature is None
        with model.disable_adapter():
            assert model.temperature is None

    def test_in_another_order_keep_it(self, classifier):
        model = tuned(classifier)
        model.set_temperature(2.0)
        model.set_class_names(CLASS_NAMES[::-1])
        assert model.temperature == 2.0

    def test_of_an_adapter_on_a_calibrated_base_leave_its_own(self, classifier, tmp_path):
        classifier.set_temperature(3.0)
        classifier.save_pretrained(tmp_path / "base")
        base = CLIPForPromptClassification.from_pretrained(tmp_path / "base")
        model = tuned(base, class_names=["cat", "dog"], temperature=2.0)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.warns(UserWarning, match="The temperature 3 was fitted for other class names"):
            loaded = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter")
        assert loaded.temperature == 2.0


def test_several_labels_per_image(images):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    model.config.problem_type = "multi_label_classification"
    logits = torch.randn(80, 4) * 3
    labels = (torch.rand(80, 4) < (logits / 2).sigmoid()).long()
    assert fit_temperature(model, logits=logits, labels=labels).ece_after < 0.2
    with pytest.raises(ValueError, match="must be zeros and ones, got 2"):
        fit_temperature(model, logits=logits, labels=labels * 2)
    with pytest.raises(ValueError, match=r"labels are \(B, 4\) zeros and ones"):
        fit_temperature(model, logits=logits, labels=labels[:, 0])
