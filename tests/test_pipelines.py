"""Pipelines of transformers: a saved classifier is never taken for an untrained one, whoever loads it."""

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from adapters import tuned
from conftest import CLASS_NAMES, TINY_CLIP
from families import CLASS_NAMES as FAMILY_CLASS_NAMES
from families import FAMILIES
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, CLIPModel, CLIPVisionModel, pipeline
from transformers.utils import logging as transformers_logging

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    CLIPForPromptClassification,
    PromptClassificationPipeline,
)


TASK = "prompt-image-classification"
STOCK = "image-classification"

# Calls `pipeline` in a process of its own, once for each line of standard input, and prints the answers as json.
CLIENT = """
import json, sys
from PIL import Image
from transformers import pipeline
image = Image.open(sys.argv[1])
for line in sys.stdin:
    try:
        answer = pipeline(**json.loads(line))(image)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""


@pytest.fixture
def image():
    return Image.linear_gradient("L").convert("RGB")


@torch.no_grad()
def expected_scores(model, inputs, class_names=CLASS_NAMES):
    return dict(zip(class_names, model.eval()(**inputs).logits.softmax(-1)[0].tolist()))


def scores_of(answer):
    return {entry["label"]: entry["score"] for entry in answer}


def in_a_fresh_process(tmp_path, image, *calls, begin_with=""):
    """The answers of `pipeline`, each a list, or a text if it raised. Nothing but transformers is imported."""
    image.save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", begin_with + CLIENT, str(tmp_path / "image.png")],
        input="\n".join(map(json.dumps, calls)), capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def save(model, image_processor, folder):
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_fresh_process_refuses_a_saved_classifier_and_answers_rightly_with_its_code(
    classifier, image_processor, image, tmp_path
):
    folder = save(classifier, image_processor, tmp_path / "saved")
    over_saved = tuned(AutoModelForPromptClassification.from_pretrained(folder))
    adapter = save(over_saved, image_processor, tmp_path / "adapter")
    inputs = image_processor(image, return_tensors="pt")
    code = {"task": STOCK, "trust_remote_code": True}
    refused, unnamed_task, answer, adapter_refused, adapter_answer = in_a_fresh_process(
        tmp_path, image,
        {"task": STOCK, "model": folder},
        {"model": folder},
        {**code, "model": folder},
        {"task": STOCK, "model": adapter},
        {**code, "model": adapter, "image_processor": adapter},
    )  # fmt: skip
    for message in (refused, unnamed_task, adapter_refused):
        assert message.startswith("ValueError") and "trust_remote_code=True" in message
    assert scores_of(answer) == pytest.approx(expected_scores(classifier, inputs), abs=1e-5)
    assert scores_of(adapter_answer) == pytest.approx(expected_scores(over_saved, inputs), abs=1e-5)


@pytest.mark.slow
def test_where_the_package_is_missing_the_code_says_how_to_install_it(classifier, image_processor, image, tmp_path):
    folder = save(classifier, image_processor, tmp_path / "saved")
    call = {"task": STOCK, "model": folder, "trust_remote_code": True}
    (message,) = in_a_fresh_process(
        tmp_path, image, call, begin_with="import sys; sys.modules['clip_prompt_peft'] = None\n"
    )
    assert message.startswith("ImportError") and "pip install" in message and "clip_prompt_peft" in message


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"CLIP"}))
def test_every_family_is_refused_without_its_code_and_right_with_it(name, tmp_path, image, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    family = FAMILIES[name]
    folder = save(family.classifier(), family.image_processor, tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(STOCK, model=folder)
    inputs = family.image_processor(image, return_tensors="pt")
    expected = expected_scores(family.classifier(), inputs, FAMILY_CLASS_NAMES)
    for answer in (
        pipeline(STOCK, model=folder, trust_remote_code=True)(image),
        pipeline(TASK, model=folder)(image),
    ):
        assert scores_of(answer) == pytest.approx(expected, abs=1e-5)


class TestOwnTask:
    def test_it_loads_a_saved_classifier_and_an_adapter(self, classifier, image_processor, image, tmp_path):
        folder = save(classifier, image_processor, tmp_path / "saved")
        inputs = image_processor(image, return_tensors="pt")
        answer = pipeline(TASK, model=folder)(image)
        assert scores_of(answer) == pytest.approx(expected_scores(classifier, inputs), abs=1e-5)
        model = tuned(classifier)
        answer = pipeline(TASK, model=save(model, image_processor, tmp_path / "adapter"))(image)
        assert scores_of(answer) == pytest.approx(expected_scores(model, inputs), abs=1e-5)

    def test_the_stock_task_with_our_class_answers_rightly(self, classifier, image_processor, image, tmp_path):
        folder = save(classifier, image_processor, tmp_path / "saved")
        expected = expected_scores(classifier, image_processor(image, return_tensors="pt"))
        answer = pipeline(STOCK, model=folder, pipeline_class=PromptClassificationPipeline)(image)
        assert scores_of(answer) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("kind", ["classifier", "peft_model"])
    def test_it_takes_a_model_in_memory_and_logs_nothing(self, classifier, image_processor, image, kind, logged):
        model = tuned(classifier) if kind == "peft_model" else classifier
        answer = pipeline(TASK, model=model, image_processor=image_processor)(image)
        expected = expected_scores(model, image_processor(image, return_tensors="pt"))
        assert scores_of(answer) == pytest.approx(expected, abs=1e-5)
        assert logged == []

    def test_it_refuses_other_models_by_name(self, image_processor):
        with pytest.raises(TypeError, match="got a CLIPVisionModel"):
            pipeline(TASK, model=CLIPVisionModel.from_pretrained(TINY_CLIP), image_processor=image_processor)

    def test_what_it_saves_it_loads_again(self, classifier, image_processor, image, tmp_path):
        folder = save(classifier, image_processor, tmp_path / "saved")
        first = pipeline(TASK, model=folder)
        first.save_pretrained(tmp_path / "again")
        assert {path.name for path in (tmp_path / "again").iterdir()} == {
            path.name for path in (tmp_path / "saved").iterdir()
        }
        assert pipeline(TASK, model=str(tmp_path / "again"))(image) == first(image)


@pytest.fixture
def logged():
    """What transformers logs and Python warns about, except for one warning of transformers about itself."""
    messages = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.add_handler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages.extend(str(one.message) for one in caught if "is_gradient_checkpointing" not in str(one.message))
    transformers_logging.remove_handler(handler)


class TestTheEntryCostsNothing:
    def test_other_classes_and_pipelines_load_the_folder_without_a_word(
        self, classifier, image_processor, image, tmp_path, logged
    ):
        folder = save(classifier, image_processor, tmp_path)
        for model_class in (CLIPModel, AutoModel, AutoModelForZeroShotImageClassification):
            assert type(model_class.from_pretrained(folder)) is CLIPModel
        assert type(AutoModelForPromptClassification.from_pretrained(folder)) is CLIPForPromptClassification
        zero_shot = pipeline("zero-shot-image-classification", model=folder)
        template = classifier.prompt_template
        answer = zero_shot(image, candidate_labels=CLASS_NAMES, hypothesis_template=template)
        expected = expected_scores(classifier, image_processor(image, return_tensors="pt"))
        assert scores_of(answer) == pytest.approx(expected, abs=1e-5)
        assert logged == []

    def test_a_classifier_saved_without_the_entry_still_loads(self, classifier, pixel_values, tmp_path):
        classifier.save_pretrained(tmp_path)
        (tmp_path / "prompt_classification_pipeline.py").unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        del config["custom_pipelines"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = AutoModelForPromptClassification.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(again(pixel_values).logits, classifier(pixel_values).logits)

    def test_the_plain_model_has_neither_code_nor_names_that_a_new_layer_would_take(
        self, classifier, image_processor, tmp_path
    ):
        again = CLIPForPromptClassification.from_pretrained(save(classifier, image_processor, tmp_path / "saved"))
        plain = again.to_base()
        assert not hasattr(plain.config, "custom_pipelines")
        assert set(plain.config.id2label.values()).isdisjoint(CLASS_NAMES)
        assert list(again.config.id2label.values()) == CLASS_NAMES
        assert CLIPForPromptClassification.from_base(plain, again.tokenizer).class_names == CLASS_NAMES

    def test_a_config_can_be_shown_after_a_pipeline_has_loaded_the_model(self, classifier, image_processor, tmp_path):
        folder = save(classifier, image_processor, tmp_path)
        loaded = pipeline(STOCK, model=folder, pipeline_class=PromptClassificationPipeline)
        assert "custom_pipelines" in loaded.model.config.to_json_string()
