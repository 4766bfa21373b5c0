"""Tests of exported classifiers: the files give the predictions of the model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import as_if_trained, fitted
from conftest import EMOJI, TINY_CLIP
from families import Case
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, method_config
from clip_prompt_peft.data import class_names_of, load_image_dataset, with_pixel_values
from clip_prompt_peft.evaluation.conformal import ConformalClassifier
from clip_prompt_peft.export import (
    CLASS_EMBEDS_FILE,
    INT8_FILE,
    ONNX_FILE,
    BakedClassifier,
    export_classifier,
    write_int8,
)
from clip_prompt_peft.heads import CachedImages


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def dataset():
    return load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]


@pytest.fixture(scope="module")
def pixel_values(dataset):
    """The pixel values of 100 real images."""
    examples = with_pixel_values(dataset.shuffle(seed=0), AutoImageProcessor.from_pretrained(TINY_CLIP))
    return torch.stack(examples[:100]["pixel_values"])


def tuned_model(dataset, preset="kgcoop"):
    torch.manual_seed(0)
    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset))
    model = get_peft_model(base, CLIPPromptTuningConfig.from_preset(preset, base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def exported(dataset, tmp_path_factory):
    """An exported text-only adapter, with all options."""
    model, path = tuned_model(dataset), tmp_path_factory.mktemp("exported") / "pets" / "v1"
    report = export_classifier(model, path, images=dataset["image"], labels=dataset["label"], int8=True)
    return SimpleNamespace(model=model, path=path, report=report)


def run(file, pixel_values):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"pixel_values": pixel_values.numpy()})]


@torch.no_grad()
def logits_of(model, pixel_values):
    was_training = model.training
    logits = model.eval()(pixel_values=pixel_values).logits
    model.train(was_training)
    return logits


@pytest.mark.slow
def test_onnxruntime_gives_the_logits_of_the_model_on_100_real_images(exported, pixel_values):
    logits, _ = run(exported.path / ONNX_FILE, pixel_values)
    torch.testing.assert_close(logits, logits_of(exported.model, pixel_values), rtol=0, atol=1e-4)
    with exported.model.disable_adapter():
        assert (logits - logits_of(exported.model, pixel_values)).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_may_have_any_size(exported, pixel_values, batch_size):
    logits, embeds = run(exported.path / ONNX_FILE, pixel_values[:batch_size])
    assert logits.shape[0] == embeds.shape[0] == batch_size
    torch.testing.assert_close(logits, logits_of(exported.model, pixel_values)[:batch_size], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_class_embeddings_file_gives_the_logits(exported, pixel_values):
    with safe_open(exported.path / CLASS_EMBEDS_FILE, framework="pt") as file:
        class_embeds, scale = file.get_tensor("class_embeds"), file.get_tensor("scale")
        assert json.loads(file.metadata()["class_names"]) == exported.model.class_names
    with torch.no_grad():
        features = exported.model.get_base_model().get_image_features(pixel_values).pooler_output
    logits = scale * features / features.norm(dim=-1, keepdim=True) @ class_embeds.T
    torch.testing.assert_close(logits, logits_of(exported.model, pixel_values), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clap", "tip-adapter-f"])
def test_class_heads_are_exported_with_all_that_they_add(dataset, pixel_values, tmp_path, method):
    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset))
    fields = {"alpha": 2.0, "beta": 3.0} if method == "tip-adapter-f" else {}
    model = as_if_trained(fitted(get_peft_model(base, method_config(method, base, **fields)))).eval()
    model.set_class_names(["owl", *model.class_names[:3]])  # one that the head does not know
    base.set_temperature(1.6)
    expected = logits_of(model, pixel_values)
    export_classifier(model, tmp_path)
    torch.testing.assert_close(run(tmp_path / ONNX_FILE, pixel_values)[0], expected, rtol=0, atol=1e-4)
    saved = load_file(tmp_path / CLASS_EMBEDS_FILE)
    with torch.no_grad():
        embeds = base.get_image_features(pixel_values).pooler_output
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    logits = saved["scale"] * embeds @ saved["class_embeds"].T + saved["bias"]
    if method == "tip-adapter-f":
        affinity = (-saved["cache_beta"] * (1 - embeds @ saved["cache_keys"].T)).exp()
        logits = logits + saved["cache_alpha"] * affinity @ saved["cache_values"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_labels_and_preprocessing_are_saved_beside_the_graph(exported, dataset, pixel_values):
    assert json.loads((exported.path / "labels.json").read_text()) == class_names_of(dataset)
    processor = AutoImageProcessor.from_pretrained(exported.path)
    image = dataset.shuffle(seed=0)[0]["image"].convert("RGB")
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], pixel_values[0])


@pytest.mark.slow
def test_the_report_lists_the_files_and_the_differences(exported, dataset):
    report = exported.report
    assert report.num_images == len(dataset)
    assert 0 < report.max_difference < 1e-4
    for name, size in report.files.items():
        assert (exported.path / name).stat().st_size == size
    saved = json.loads((exported.path / "export.json").read_text())
    assert saved["max_difference"] == report.max_difference
    assert saved["int8"]["accuracy"] == report.int8.accuracy


@pytest.mark.slow
def test_the_8_bit_variant_is_as_accurate_and_much_smaller(exported, dataset):
    examples = with_pixel_values(dataset, AutoImageProcessor.from_pretrained(TINY_CLIP))[:]
    pixel_values, labels = torch.stack(examples["pixel_values"]), torch.tensor(examples["labels"])
    accuracy = {
        name: (run(exported.path / name, pixel_values)[0].argmax(dim=1) == labels).float().mean().item()
        for name in (ONNX_FILE, INT8_FILE)
    }
    assert accuracy[INT8_FILE] >= accuracy[ONNX_FILE] - 0.02
    assert exported.report.int8.float_accuracy == pytest.approx(accuracy[ONNX_FILE])
    assert exported.report.int8.is_kept and exported.report.int8.agreement > 0.95
    assert exported.report.files[INT8_FILE] < exported.report.files[ONNX_FILE] / 2


@pytest.mark.slow
def test_export_does_not_change_the_model(exported, dataset, pixel_values):
    fresh = tuned_model(dataset)
    assert exported.model.training == fresh.training
    assert torch.equal(logits_of(exported.model, pixel_values), logits_of(fresh, pixel_values))


@pytest.mark.slow
def test_every_module_keeps_its_training_mode(dataset, tmp_path):
    model = tuned_model(dataset)
    model.train().get_base_model().vision_model.eval()
    before = {name: module.training for name, module in model.named_modules()}
    export_classifier(model, tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_deep_prompts_in_both_towers_are_exported(dataset, pixel_values, tmp_path):
    model = tuned_model(dataset, "maple")
    report = export_classifier(model, tmp_path, images=dataset["image"][:20])
    assert report.num_images == 20
    logits, _ = run(tmp_path / ONNX_FILE, pixel_values)
    torch.testing.assert_close(logits, logits_of(model, pixel_values), rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (logits - logits_of(model, pixel_values)).abs().max() > 0.1


def test_an_adapter_conditioned_on_the_image_cannot_be_exported(dataset, tmp_path):
    with pytest.raises(ValueError, match="conditioned on the image: its class embeddings differ"):
        export_classifier(tuned_model(dataset, "cocoop"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_lora_in_the_image_tower_is_exported_and_replaces_an_earlier_export(
    exported, dataset, pixel_values, tmp_path
):
    (tmp_path / INT8_FILE).write_bytes((exported.path / INT8_FILE).read_bytes())
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset))
    lora = LoraConfig(target_modules=r"vision_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    model = get_peft_model(classifier, lora)
    report = export_classifier(model, tmp_path)
    assert report.num_images == 0 and report.int8 is None
    logits, _ = run(tmp_path / ONNX_FILE, pixel_values)
    torch.testing.assert_close(logits, logits_of(model, pixel_values), rtol=0, atol=1e-4)
    assert not (tmp_path / INT8_FILE).exists()  # it belonged to another model


@pytest.mark.slow
def test_a_graph_with_other_logits_is_an_error_and_the_earlier_export_stays(exported, dataset, monkeypatch, tmp_path):
    (tmp_path / ONNX_FILE).write_text("older")
    monkeypatch.setattr("clip_prompt_peft.export.TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="other logits than the model"):
        export_classifier(exported.model, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(ONNX_FILE, "older")]


@pytest.mark.slow
def test_an_8_bit_variant_that_loses_accuracy_is_not_kept(
    exported, dataset, pixel_values, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr("clip_prompt_peft.export.run_onnx", lambda file, batches: np.zeros((100, 12)))
    logits = logits_of(exported.model, pixel_values).numpy()
    report = write_int8(exported.path / ONNX_FILE, tmp_path / INT8_FILE, [pixel_values], logits.argmax(axis=1), logits)
    assert report.float_accuracy == 1 and report.accuracy < 0.5
    assert not report.is_kept
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"int8": True}, "int8=True needs images and labels"),
        ({"images": []}, "images is empty"),
        ({"labels": [0, 1]}, "2 labels for 0 images"),
        ({"images": ["image"], "labels": [4]}, "Label 4 is out of range: the model has 4 classes"),
    ],
)
def test_images_and_labels_that_do_not_match_are_errors(classifier, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_classifier(classifier, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_models_that_cannot_be_exported_are_errors(classifier, clip, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="got a CLIPModel"):
        export_classifier(clip, tmp_path / "new")
    with pytest.raises(ValueError, match="torch.bfloat16; load it in float32"):
        export_classifier(classifier.to(torch.bfloat16), tmp_path / "new")
    with pytest.raises(ValueError, match="no class names"):
        export_classifier(CLIPForPromptClassification.from_pretrained(TINY_CLIP), tmp_path / "new")
    with pytest.raises(ValueError, match="pass image_processor"):
        clip.config.name_or_path = ""
        nameless = CLIPForPromptClassification.from_clip(CLIPModel(clip.config), tokenizer, class_names=["cat"])
        export_classifier(nameless, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_prompt_peft.export.find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ImportError, match=r'needs onnxscript, .*pip install .*"onnxscript>='):
        export_classifier(classifier, tmp_path / "new")


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_temperature_is_part_of_scale_and_bias(family):
    case = Case(family)
    classifier, inputs = case.classifier().eval(), case.images
    with torch.no_grad():
        raw = classifier(**inputs).logits
        classifier.set_temperature(2.5)
        logits, _ = BakedClassifier(classifier, classifier.get_class_embeds(), classifier.class_head)(**inputs)
    torch.testing.assert_close(logits, raw / 2.5, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_temperature_divides_what_a_cache_of_images_adds():
    classifier = Case("CLIP").classifier().eval()
    images = Case("CLIP").images["pixel_values"]
    keys = torch.nn.functional.normalize(torch.randn(6, classifier.embed_width))
    cache = CachedImages(keys, torch.eye(6)[:, :4], 2, 3)
    logits = []
    for temperature in (None, 2.5):
        classifier.set_temperature(temperature)
        logits.append(BakedClassifier(classifier, classifier.get_class_embeds(), cache)(images)[0])
    torch.testing.assert_close(logits[1], logits[0] / 2.5, rtol=0, atol=1e-4)
    assert cache.alpha == 2


@pytest.mark.slow
def test_scores_of_a_calibrated_classifier_are_exported_if_they_are_its_own(dataset, tmp_path, pixel_values, caplog):
    model = tuned_model(dataset).eval()
    model.set_temperature(1.7)
    ConformalClassifier.fit(model, dataset.select(range(40)), AutoImageProcessor.from_pretrained(TINY_CLIP))
    export_classifier(model, tmp_path)
    torch.testing.assert_close(
        run(tmp_path / ONNX_FILE, pixel_values)[0], logits_of(model, pixel_values), rtol=0, atol=1e-4
    )
    written = json.loads((tmp_path / "conformal.json").read_text())
    assert written["scores"] == model.conformal_scores["scores"] and "probe" not in written
    model.set_temperature(2.0)
    export_classifier(model, tmp_path)
    assert "scores for sets of classes are not exported: The sets were calibrated with the temperature" in caplog.text
    assert not (tmp_path / "conformal.json").exists()
