"""Moves between devices, files written from a card, resuming on it, and device maps."""

import copy

import pytest
import torch
from adapters import logits_of, tuned, vectors_of
from conftest import CLASS_NAMES, TINY_CLIP, needs_compile
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)


pytestmark = pytest.mark.gpu

CLOSE = {"rtol": 0, "atol": 2e-3}


def on(device, model, pixel_values):
    return logits_of(model.eval(), pixel_values.to(device)).cpu()


def test_kept_embeddings_follow_the_model_between_devices(device, classifier, pixel_values):
    model = tuned(classifier)
    expected = on("cpu", model, pixel_values)
    for place in (device, torch.device("cpu"), device):
        model.to(place)
        for _ in range(2):  # the second time class embeddings are kept ones
            torch.testing.assert_close(on(place, model, pixel_values), expected, **CLOSE)


def test_a_mixed_batch_is_that_of_the_cpu(device, classifier, pixel_values):
    model = tuned(classifier)
    model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDOM"))
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixel_values, adapter_names=names).logits
        found = model.to(device)(pixel_values=pixel_values.to(device), adapter_names=names).logits
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_merging_and_saving_from_the_device(device, classifier, pixel_values, tmp_path):
    model = tuned(classifier).to(device)
    expected = on(device, model, pixel_values)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(on("cpu", again, pixel_values), expected, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(on(device, merged, pixel_values), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = CLIPForPromptClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(on("cpu", again, pixel_values), expected, **CLOSE)


def test_exporting_from_the_device(device, classifier, image_processor, pixel_values, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from clip_prompt_peft.export import export_classifier

    model = tuned(classifier).to(device)
    expected = on(device, model, pixel_values)
    export_classifier(model, tmp_path, image_processor=image_processor)
    session = onnxruntime.InferenceSession(str(next(tmp_path.glob("*.onnx"))), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)


def train(device, folder, data, resume=None):
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    args = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        full_determinism=True, report_to=[], use_cpu=device.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert trainer.model.device.type == device.type
    return vectors_of(trainer.model).detach().cpu()


def test_a_resumed_training_ends_bit_for_bit_as_an_undisturbed_one(device, tmp_path):
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"pixel_values": images.numpy(), "labels": [0, 1, 2, 3] * 2}).with_format("torch")
    try:
        whole = train(device, tmp_path / "whole", data)
        resumed = train(device, tmp_path / "resumed", data, tmp_path / "whole" / "checkpoint-2")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("device_map", ["one device", "auto"])
def test_device_maps(device, classifier, pixel_values, device_map):
    expected = on("cpu", classifier, pixel_values)
    places = "auto" if device_map == "auto" else {"": device}
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES, device_map=places)
    assert model.device.type == device.type
    torch.testing.assert_close(on(device, model, pixel_values), expected, **CLOSE)


@needs_compile
def test_a_compiled_model_is_that_without(device, classifier, pixel_values):
    model = tuned(classifier).to(device)
    expected = on(device, model, pixel_values)
    compiled = torch.compile(copy.deepcopy(model))
    torch.testing.assert_close(on(device, compiled, pixel_values), expected, **CLOSE)
