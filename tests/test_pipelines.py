"""Pipelines of transformers: a saved classifier is never taken for an untrained one, whoever loads it."""

import base64
import json
import logging
import os
import subprocess
import sys
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
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
from clip_prompt_peft.commands.predict import classify as predict
from clip_prompt_peft.evaluation.conformal import ConformalClassifier
from clip_prompt_peft.image_files import UnreadableImageError, decode_image, process_images


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


def saved_images(folder):
    """Image files of many kinds of values, by their names."""
    values = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) % 251
    colors = np.stack([values, values[::-1], values.T.reshape(48, 40)], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(colors).save(folder / "color.png")
    Image.fromarray(colors).save(folder / "turned.png", exif=exif)
    Image.fromarray(colors).convert("CMYK").save(folder / "inks.tif")
    Image.fromarray(values * 257).save(folder / "gray16.png")
    Image.fromarray(values * 257).save(folder / "gray16.tif")
    Image.fromarray(values.astype(np.int32)).save(folder / "integers.tif")
    Image.fromarray(values.astype(np.float32) / 255).save(folder / "floats.tif")
    Image.new("L", (1, 60_000), 99).save(folder / "long.png")
    return sorted(folder.iterdir())


class TestImages:
    @pytest.fixture
    def classify(self, classifier, image_processor):
        return pipeline(TASK, model=classifier, image_processor=image_processor)

    def test_each_kind_of_file_has_the_answer_of_predict(self, classify, image_processor, tmp_path):
        for file in saved_images(tmp_path):
            lines = predict(classify.model, image_processor, {file: decode_image(file)}, top_k=1)
            given = {
                "path": str(file),
                "Path": file,
                "bytes": file.read_bytes(),
                "base64": base64.encodebytes(file.read_bytes()).decode(),
                "Pillow": Image.open(file),
                "array": np.asarray(decode_image(file)),
                "tensor": torch.tensor(np.asarray(decode_image(file))).permute(2, 0, 1),
                "floats": torch.tensor(np.asarray(decode_image(file))).permute(2, 0, 1) / 255,
            }
            expected = expected_scores(classify.model, process_images(image_processor, [decode_image(file)]))
            for kind, image in given.items():
                if "long.png" in str(file) and kind == "floats":  # so dark that the answer is the same by chance
                    continue
                answer = classify(image)
                assert scores_of(answer) == pytest.approx(expected, abs=1e-5), (file.name, kind)
                assert [lines[0][1], lines[0][2]] == [answer[0]["label"], f"{answer[0]['score']:.1%}"]

    def test_gray_values_of_more_than_8_bits_are_neither_white_nor_black(self, classify, tmp_path):
        values = (np.arange(32 * 32).reshape(32, 32) % 251).astype(np.uint16)
        expected = classify.preprocess(values.astype(np.uint8))["pixel_values"]
        for image in (values * 257, values.astype(np.int32), values.astype(np.float32) / 255):
            for given in (image, Image.fromarray(image)):
                assert torch.equal(classify.preprocess(given)["pixel_values"], expected)
        assert torch.equal(classify.preprocess(values > 100)["pixel_values"].unique(), classify.preprocess(
            (values > 100).astype(np.uint8) * 255)["pixel_values"].unique())  # fmt: skip

    def test_lists_and_addresses(self, classify, tmp_path):
        saved_images(tmp_path)
        assert classify([]) == [] and classify(()) == []
        several = classify([str(tmp_path / "color.png"), tmp_path / "gray16.png"], batch_size=2)
        assert [len(answer) for answer in several] == [4, 4]  # classes
        handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            answer = classify(f"{address}/gray16.png", timeout=60)
            with pytest.raises(UnreadableImageError, match="nowhere.png': it cannot be fetched.*404"):
                classify(f"{address}/nowhere.png")
            server.shutdown()
        assert scores_of(answer) == pytest.approx(scores_of(several[1]), abs=1e-5)

    def test_what_cannot_be_decoded_is_named(self, classify, tmp_path):
        saved_images(tmp_path)
        content = (tmp_path / "color.png").read_bytes()
        (tmp_path / "damaged.png").write_bytes(content[: len(content) // 2])
        cut_off = base64.b64encode(content[: len(content) // 2 // 3 * 3]).decode()
        for image, message in (
            ("nowhere/cat.jpg", "'nowhere/cat.jpg': No such file"),
            ("nowhere", "'nowhere': No such file"),
            (tmp_path / "nowhere.png", "nowhere.png': No such file"),
            (str(tmp_path / "damaged.png"), "damaged.png': it is damaged"),
            (cut_off, "the base64 text .*: it is damaged"),
            ("data:image/png;base64,AAAAA", "the base64 text 'data:image/png;base64,AAAAA'"),
            (np.zeros((2, 3, 8, 8), np.uint8), "expected one image of shape"),
            (np.full((8, 8, 3), -1.5), "range from -1.5"),
            (np.full((8, 8), np.nan), "range from nan"),
        ):
            with pytest.raises(UnreadableImageError, match=message) as caught:
                classify(image)
            assert len(str(caught.value)) < 700
        with pytest.raises(TypeError, match="got a dict"):
            classify({"image": None})


class TestSetsOfClasses:
    @pytest.fixture
    def model(self, classifier):
        model = tuned(classifier)
        logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        ConformalClassifier.fit(model, logits=logits, labels=torch.arange(40) % 4, method="lac")
        return model

    def test_are_those_of_the_model_also_after_saving(self, model, image, image_processor, tmp_path):
        expected = ConformalClassifier(model, image_processor).predict_set([image], coverage=0.6)
        save(model, image_processor, tmp_path)
        for classify in (
            PromptClassificationPipeline(model, image_processor=image_processor),
            pipeline(TASK, model=str(tmp_path)),
        ):
            one, two = classify(image, coverage=0.6), classify([image, image], coverage=0.6, batch_size=2)
            assert all([entry["label"] for entry in each] == expected.names[0] for each in (one, *two))
            assert len(two) == 2
            scores = {model.class_names[label]: expected.probabilities[0, label] for label in expected.labels[0]}
            assert scores_of(one) == pytest.approx(scores, abs=1e-5)
            assert len(classify(image)) == 4  # a coverage is that of one call

    def test_are_refused_with_other_arguments_or_without_scores(self, model, image, image_processor):
        classify = PromptClassificationPipeline(model, image_processor=image_processor)
        for arguments, message in (
            ({"coverage": 0.9, "top_k": 2}, "leave out top_k"),
            ({"coverage": 1.5}, "coverage must be a number between 0 and 1"),
        ):
            with pytest.raises(ValueError, match=message):
                classify(image, **arguments)
        with pytest.raises(ValueError, match="leave out top_k"):
            PromptClassificationPipeline(model, image_processor=image_processor, coverage=0.9)(image, top_k=2)
        with pytest.warns(UserWarning, match="A coverage of 0.99 cannot be promised after 40 validation images"):
            assert len(classify(image, coverage=0.99)) == 4
        model.set_temperature(3.0)
        with pytest.raises(ValueError, match="calibrated with the temperature 1, and the model has 3 now"):
            classify(image, coverage=0.9)
        model.set_conformal_scores(None)
        with pytest.raises(ValueError, match="has no scores of validation images"):
            PromptClassificationPipeline(model, image_processor=image_processor)(image, coverage=0.9)
