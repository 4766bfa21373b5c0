"""Checkpoints of open_clip as base models: tuned, saved and loaded again, by our classes and by peft."""

import json

import pytest
import torch
from adapters import tuned
from families import siglip_tokenizer, xlm_tokenizer
from open_clip_cases import Case, pixel_values, values, with_openai_s_vocabulary
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, CLIPModel

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    PromptClassificationPipeline,
)
from clip_prompt_peft.commands.convert_open_clip import convert_open_clip
from clip_prompt_peft.tuner.hub import load_image_processor


CLASS_NAMES = ["cat", "fire truck", "owl"]
TOKENIZERS = {"SigLIP": siglip_tokenizer, "SigLIP 2": siglip_tokenizer, "end token": xlm_tokenizer}


def openai_s(folder):
    settings = {"mean": 0.5, "std": 0.5, "resize_mode": "squash"}
    return with_openai_s_vocabulary(folder, "layer scale in the image tower", settings)


def base_of(name, folder):
    """The folder of a checkpoint, with its tokenizer."""
    if name == "OpenAI's vocabulary":
        return openai_s(folder)
    TOKENIZERS[name]().save_pretrained(folder)
    return Case(name).write(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(pixel_values=pixel_values()).logits


@pytest.fixture(params=["OpenAI's vocabulary", *TOKENIZERS])
def base(request, tmp_path):
    return base_of(request.param, tmp_path / "base")


@pytest.mark.parametrize("preset", ["kgcoop", "maple"])
def test_an_adapter_finds_its_base_model_again(base, preset, tmp_path):
    classifier = AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES)
    model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset(preset, model=classifier))
    before = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter")
    assert again.active_peft_config.base_model_name_or_path == str(base)
    assert torch.equal(logits(again), expected)


def test_peft_and_transformers_load_the_adapter_over_the_classifier(tmp_path, recwarn):
    base = openai_s(tmp_path / "base")
    model = tuned(AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(AutoModelForPromptClassification.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(by_peft), expected)
    by_name = AutoModelForPromptClassification.from_pretrained(tmp_path / "adapter")  # as transformers' own classes
    assert by_name.class_names == CLASS_NAMES and torch.equal(logits(by_name), expected)
    assert not [warning for warning in recwarn if "trained on other weights" in str(warning.message)]


def test_lora_over_it_is_loaded_with_it(tmp_path):
    base = openai_s(tmp_path / "base")
    classifier = AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES)
    model = get_peft_model(classifier, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path / "lora")
    again = CLIPForPromptClassification.from_pretrained(tmp_path / "lora", class_names=CLASS_NAMES)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_a_merged_model_is_one_of_transformers_with_its_tokenizer(tmp_path):
    base = openai_s(tmp_path / "base")
    model = tuned(AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES))
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = CLIPForPromptClassification.from_pretrained(tmp_path / "merged")
    assert again.class_names == CLASS_NAMES
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_a_plain_model_that_came_from_it_finds_tokenizer_and_image_processor(tmp_path):
    base = openai_s(tmp_path / "base")
    plain = AutoModelForPromptClassification.from_pretrained(base).to_base()
    assert type(plain) is CLIPModel and plain.name_or_path == str(base)
    model = get_peft_model(plain, CLIPPromptTuningConfig(prompt_template="a photo of a {}.", class_names=CLASS_NAMES))
    assert model.active_peft_config.base_model_name_or_path == str(base)
    assert load_image_processor(plain).size["height"] == 24


def test_a_pipeline_takes_the_classifier_and_its_image_processor(tmp_path):
    base = openai_s(tmp_path / "base")
    model = AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES)
    classify = PromptClassificationPipeline(model=model, image_processor=load_image_processor(model))
    assert {one["label"] for one in classify(Image.new("RGB", (40, 30), "red"))} == set(CLASS_NAMES)


def test_another_checkpoint_in_the_folder_is_told(tmp_path):
    base = openai_s(tmp_path / "base")
    model = tuned(AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES))
    model.save_pretrained(tmp_path / "adapter")
    case = Case("layer scale in the image tower")
    tensors = {name: values(f"other.{name}", tensor.shape) for name, tensor in case.tensors.items()}
    for name, shape in (("token_embedding.weight", (49408, 32)), ("positional_embedding", (77, 32))):
        tensors[name] = values(f"other.{name}", shape)
    save_file(tensors, base / "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="was trained on other weights"):
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter")


def test_a_config_json_that_is_none_of_transformers_is_not_in_the_way(tmp_path):
    base = openai_s(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"download_count": 1}))
    assert AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES).class_names == CLASS_NAMES


def test_the_converted_folder_is_loaded_by_transformers_alone(tmp_path):
    base = openai_s(tmp_path / "base")
    convert_open_clip(str(base), tmp_path / "out")
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    classifier = AutoModelForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES)
    texts = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(pixel_values=pixel_values(), **texts).logits_per_image
    torch.testing.assert_close(found, logits(classifier), rtol=0, atol=1e-4)
