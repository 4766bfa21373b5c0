"""Every method of the family against numbers that its authors' code computed: logits, losses and all gradients.

The small CLIP of these numbers has 4 text layers of width 128 and 5 image layers of width 64, so a width or a depth
taken from the wrong tower shows.
"""

import re

import pytest
import torch
from conftest import GoldenCase
from peft import get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.losses.promptsrc import mean_distance, mean_divergence
from clip_prompt_peft.losses.promptsrc_templates import PROMPTSRC_TEMPLATES


TEXT, VISION = "text_model.embeddings", "vision_model.embeddings"


def coop(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "class_specific": settings.get("csc", False),
        "class_token_position": settings["class_token_position"],
        "class_token_count": "alone",
    }


def cocoop(settings):
    return {"num_virtual_tokens": settings["n_ctx"], "image_conditioned": True}


def maple(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "num_vision_virtual_tokens": settings["n_ctx"],
        "text_prompt_depth": settings["prompt_depth"],
        "vision_prompt_depth": settings["prompt_depth"],
        "vision_prompts_from_text": True,
    }


def ivlp(settings):
    vision = {
        "num_vision_virtual_tokens": settings["n_ctx_vision"],
        "vision_prompt_depth": settings["depth_vision"],
    }
    return {
        "num_virtual_tokens": settings["n_ctx_text"],
        "text_prompt_depth": settings["depth_text"],
        **(vision if settings["depth_vision"] else {}),
    }


def vpt(settings):
    return {
        "num_virtual_tokens": 0,
        "num_vision_virtual_tokens": settings["n_ctx_vision"],
        "vision_prompt_depth": settings["depth_vision"],
    }


def kgcoop(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "regularizer": "kgcoop",
        "regularizer_weights": {"weight": settings["w"]},
        "teacher_templates": [settings["teacher_template"]],
    }


def prograd(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "regularizer": "prograd",
        "regularizer_weights": {"projection": settings["lambda_"], "temperature": settings["T"]},
        "teacher_templates": [settings["teacher_template"]],
    }


def promptsrc(settings):
    weights = {"text": settings["text_loss_weight"], "image": settings["image_loss_weight"]}
    return {**ivlp(settings), "regularizer": "promptsrc", "regularizer_weights": weights}


FIELDS = {
    "coop": coop,
    "cocoop": cocoop,
    "maple": maple,
    "ivlp": ivlp,
    "vpt": vpt,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "promptsrc": promptsrc,
}


def our_name(name):
    """Where one of the authors' tensors lives here, as the end of a parameter's name."""
    if name == "ctx":
        return f"{TEXT}.learnable_embeddings.default"
    if name == "image_encoder.VPT":
        return f"{VISION}.learnable_prompts.default"
    if name.startswith("meta_net."):
        return f"{TEXT}.learnable_meta_net.default.{name.removeprefix('meta_net.')}"
    if name.startswith("proj."):
        return f"{VISION}.learnable_projections.default.{name.removeprefix('proj.')}"
    if deep := re.fullmatch(r"compound_prompts_text\.(\d+)", name):
        return f"text_model.encoder.layers.{int(deep[1]) + 1}.learnable_prompts.default"
    if deep := re.fullmatch(r"compound_prompt_projections\.(\d+)\.(\w+)", name):
        return f"vision_model.encoder.layers.{int(deep[1]) + 1}.learnable_projections.default.{deep[2]}"
    tower, layer = re.fullmatch(r"(text|image)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", name).groups()
    tower = {"text": "text_model", "image": "vision_model"}[tower]
    return f"{tower}.encoder.layers.{layer}.learnable_prompts.default"


def prompted_model(base, case, **fields):
    """The classifier of a case, with the authors' tensors in it."""
    settings, info = case.info["settings"], case.info
    # "X X cat." is written by a template without words, "a photo of a cat." by one with
    template = "a photo of a {}." if info["prompts"][0].startswith("a photo of a ") else "{}."
    classifier = CLIPForPromptClassification.from_pretrained(base, class_names=info["classnames"])
    method = FIELDS[info["method"].removesuffix("_gpa")]
    config = CLIPPromptTuningConfig(prompt_template=template, **{**method(settings), **fields})
    model = get_peft_model(classifier, config).train()
    load(model, case, "param." if any(name.startswith("param.") for name in case.tensors) else "initial.")
    return model


def tensors_of(model):
    return {name: value for name, value in model.named_parameters() if "learnable_" in name}


def load(model, case, prefix):
    values = {our_name(key.removeprefix(prefix)): case[key] for key in case.tensors if key.startswith(prefix)}
    tensors = tensors_of(model)
    assert len(values) == len(tensors)
    for name, parameter in tensors.items():
        value = values[name.removeprefix("base_model.model.")]
        assert parameter.shape == value.shape
        parameter.data.copy_(value)


def assert_near(found, expected, atol):
    torch.testing.assert_close(found.detach(), expected, atol=atol, rtol=0)


def assert_gradient(parameter, expected, tolerance):
    assert_near(parameter.grad, expected, atol=tolerance * float(expected.abs().max()))


def assert_gradients(model, case):
    tensors = tensors_of(model)
    gradients = [key for key in case.tensors if key.startswith("grad.")]
    assert len(gradients) == len(tensors)
    for key in gradients:
        parameter = tensors[f"base_model.model.{our_name(key.removeprefix('grad.'))}"]
        assert_gradient(parameter, case[key], case.info["tolerances"]["grad_max_abs_over_absmax"])


FORWARD_CASES = [
    "coop_csc_end_n4",
    "coop_csc_front_n16",
    "coop_csc_middle_n4",
    "coop_ctxinit_end",
    "coop_shared_end_n16",
    "coop_shared_end_n4",
    "coop_shared_front_n4",
    "coop_shared_front_punctuation",
    "coop_shared_middle_n4",
    "cocoop_ctxinit",
    "cocoop_n4",
    "ivlp_deep_ctxinit",
    "ivlp_deep_t3_v4",
    "ivlp_shallow",
    "ivlp_text_only_deep_t4_v0",
    "kgcoop_ctxinit_w8",
    "kgcoop_random_n4_w1",
    "maple_ctxinit_n2_depth3",
    "maple_n2_depth3",
    "maple_n4_depth1_shallow",
    "promptsrc_ctxinit",
    "promptsrc_random_n2",
    "vpt_deep_n3_d5",
    "vpt_shallow_n4",
]


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_loss_and_every_gradient_are_the_authors(name, golden_base):
    case = GoldenCase(name)
    model = prompted_model(golden_base, case)
    outputs = model(pixel_values=case.pixel_values, labels=case.labels, return_loss_terms=True)
    outputs.loss.backward()
    tolerances = case.info["tolerances"]
    assert_near(outputs.logits, case["logits"], tolerances["logits_atol"])
    assert_near(outputs.loss, case["loss"], tolerances["loss_atol"])
    assert_near(outputs.loss_terms["cross_entropy"], case["ce_loss"], tolerances["loss_atol"])
    assert_gradients(model, case)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values=case.pixel_values).logits, outputs.logits)
