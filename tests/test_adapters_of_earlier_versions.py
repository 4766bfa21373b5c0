"""Adapters that an earlier version saved load in every way and answer as they did then; see tests/golden/adapters."""

import json

import pytest
import torch
from conftest import GOLDEN, TINY_CLIP
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification


ADAPTERS = GOLDEN / "adapters"
EXPECTED = load_file(ADAPTERS / "expected.safetensors")
CLASS_NAMES = ["cat", "fire truck", "lily of the valley", "sun"]
KINDS = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())


def kinds_with(what):
    return [kind for kind in KINDS if f"{kind}.{what}" in EXPECTED]


def load_with_auto_class(kind):
    return AutoPeftModelForPromptClassification.from_pretrained(ADAPTERS / kind, base_model_name_or_path=TINY_CLIP)


def load_with_peft(model, kind):
    return PeftModel.from_pretrained(model, ADAPTERS / kind)


def load_with_transformers(model, kind):
    model.load_adapter(str(ADAPTERS / kind))
    return model


BOTH_LOADERS = pytest.mark.parametrize("load", [load_with_peft, load_with_transformers])


def texts(kind, tokenizer):
    """The class names in the adapter's template."""
    template = json.loads((ADAPTERS / kind / "adapter_config.json").read_text())["padded_template"]
    return tokenizer([template.replace("{}", name) for name in CLASS_NAMES], padding=True, return_tensors="pt")


def assert_as_then(found, name):
    torch.testing.assert_close(found, EXPECTED[name], rtol=0, atol=1e-5)


def test_every_folder_holds_an_adapter_and_has_an_expected_answer():
    assert len(KINDS) == 17
    for kind in KINDS:
        assert sorted(file.name for file in (ADAPTERS / kind).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert any(name.startswith(f"{kind}.") for name in EXPECTED)


@torch.no_grad()
@pytest.mark.parametrize("kind", kinds_with("logits"))
def test_the_auto_class_builds_the_classifier(kind):
    model = load_with_auto_class(kind).eval()
    assert model.class_names == CLASS_NAMES
    assert (model.config.problem_type == "multi_label_classification") == (kind == "multi-label")
    assert_as_then(model(pixel_values=EXPECTED["pixel_values"]).logits, f"{kind}.logits")


@torch.no_grad()
@BOTH_LOADERS
@pytest.mark.parametrize("kind", kinds_with("logits"))
def test_a_classifier_loads_it(kind, load):
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    model = load(classifier, kind).eval()
    assert_as_then(model(pixel_values=EXPECTED["pixel_values"]).logits, f"{kind}.logits")


@torch.no_grad()
@BOTH_LOADERS
@pytest.mark.parametrize("kind", kinds_with("plain"))
def test_a_plain_clip_loads_it(kind, load, clip, tokenizer):
    model = load(clip, kind).eval()
    logits = model(**texts(kind, tokenizer), pixel_values=EXPECTED["pixel_values"]).logits_per_image
    assert_as_then(logits, f"{kind}.plain")


@torch.no_grad()
def test_the_auto_class_takes_one_that_transformers_saved_without_class_names():
    model = load_with_auto_class("transformers").eval()
    model.set_class_names(CLASS_NAMES)
    assert_as_then(model(pixel_values=EXPECTED["pixel_values"]).logits, "transformers.plain")


@torch.no_grad()
@BOTH_LOADERS
def test_a_bare_text_model_loads_it(load, tokenizer):
    model = load(CLIPTextModel.from_pretrained(TINY_CLIP), "text-model").eval()
    assert_as_then(model(**texts("text-model", tokenizer)).pooler_output, "text-model.pooled")
