"""`torch.export` of classifiers that have not been called before."""

import pytest
import torch
from adapters import as_if_trained, logits_of
from cases import new_classifier
from conftest import needs_compile, slow_param
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
KINDS = {
    "shared": {},
    "class_specific": {"class_specific": True},
    "middle": {"class_token_position": "middle"},
    "coupled": {**DEEP, "vision_prompts_from_text": True},
    "image_conditioned": {"image_conditioned": True},
    "class_aware": {"class_aware_layer": 1},
}


@needs_compile
@pytest.mark.parametrize("strict", [False, slow_param(True)])
@pytest.mark.parametrize("kind", ["shared", *map(slow_param, list(KINDS)[1:])])
def test_a_classifier_is_exported_without_a_call_before(kind, strict, pixel_values):
    """The number of images stays open, except if every image has its own prompts."""
    model = as_if_trained(get_peft_model(new_classifier(), CLIPPromptTuningConfig(**KINDS[kind])).eval())
    is_open = kind != "image_conditioned"
    shapes = {"pixel_values": {0: torch.export.Dim("images", min=2, max=64)}} if is_open else None
    inputs = {"pixel_values": pixel_values}
    program = torch.export.export(model.get_base_model(), (), inputs, dynamic_shapes=shapes, strict=strict)
    images = torch.randn(5, *pixel_values.shape[1:]) if is_open else pixel_values
    logits = program.module()(pixel_values=images).logits
    torch.testing.assert_close(logits.detach(), logits_of(model, images), rtol=1e-4, atol=1e-4)


@needs_compile
def test_an_export_follows_the_adapter_and_the_classes_of_that_moment(pixel_values):
    model = new_classifier()
    logits_of(model, pixel_values)
    model.set_class_names(["cat", "owl"])
    program = torch.export.export(model, (), {"pixel_values": pixel_values})
    logits = program.module()(pixel_values=pixel_values).logits
    torch.testing.assert_close(logits.detach(), logits_of(model, pixel_values), rtol=1e-4, atol=1e-4)
