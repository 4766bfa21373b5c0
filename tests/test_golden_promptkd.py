"""PromptKD against numbers of its authors' code: logits, loss, gradients, a step of SGD, BatchNorm's statistics."""

import pytest
import torch
from conftest import GoldenCase
from peft import get_peft_model
from torch.testing import assert_close

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, distillation_loss
from clip_prompt_peft.training.recipes import SGD


CASES = ["promptkd_w1000_t1", "promptkd_w200_t2", "promptkd_shallow_w1000_t1_e24"]
PARTS = {"0": "in", "1": "norm", "3": "out"}
WITHOUT_GRADIENT = "VPT_image_trans.conv1.0.bias"  # before a BatchNorm in training: 0 but for rounding


def our_name(name):
    """Where one of the authors' tensors lives here."""
    if name.startswith("running_"):
        return f"image_head.learnable_projector_norm.default.{name}"
    if name.startswith("VPT_image_trans"):
        _, _, part, kind = name.split(".")
        return f"image_head.learnable_projector_{PARTS[part]}.default.{kind}"
    if name == "image_encoder.VPT":
        return "vision_model.embeddings.learnable_prompts.default"
    return f"vision_model.encoder.layers.{name.split('.')[3]}.learnable_prompts.default"


def promptkd(case, base):
    """The classifier of a case in training mode, with the authors' tensors and the given teacher in it."""
    settings, names = case.info["settings"], [name.replace("_", " ") for name in case.info["classnames"]]
    config = CLIPPromptTuningConfig.from_preset(
        "promptkd",
        num_vision_virtual_tokens=settings["n_ctx_vision"],
        vision_prompt_depth=settings["depth_vision"],
        projection_dim=settings["teacher_dim"],
    )
    model = get_peft_model(CLIPForPromptClassification.from_pretrained(base, class_names=names), config).train()
    model.set_teacher_class_embeds(case["teacher_text_features"])
    tensors = tensors_of(model)
    given = {key: case[key] for key in case.tensors if key.startswith(("param.", "buffer.running"))}
    assert len(given) == len(tensors) - 1  # all but the class embeddings
    for key, value in given.items():
        tensors[our_name(key.partition(".")[2])].data.copy_(flat(value))
    return model


def flat(value):
    return value.flatten(1) if value.ndim == 4 else value  # convolutions of one pixel


def tensors_of(model):
    tensors = model.state_dict(keep_vars=True).items()
    return {name.removeprefix("base_model.model."): value for name, value in tensors if "learnable_" in name}


def assert_near(found, expected, atol):
    assert_close(found.detach(), expected, atol=atol, rtol=0)


def loss_of(case, logits):
    settings = case.info["settings"]
    return distillation_loss(logits, case["teacher_logits"], settings["kd_weight"], settings["temperature"])


@torch.no_grad()
def eval_logits(model, case):
    return model.eval()(pixel_values=case.pixel_values).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_a_step_are_the_authors(name, golden_base):
    case = GoldenCase(name)
    model, tolerances = promptkd(case, golden_base), case.info["tolerances"]
    assert_near(eval_logits(model, case), case["eval_logits"], tolerances["logits_atol"])
    model.train()
    logits = model(pixel_values=case.pixel_values).logits
    loss = loss_of(case, logits)
    loss.backward()
    assert_near(logits, case["logits"], tolerances["logits_atol"])
    assert_near(loss, case["loss"], tolerances["loss_atol"])
    tensors = tensors_of(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    gradients = [key.partition(".")[2] for key in case.tensors if key.startswith("grad.")]
    assert len(gradients) == len(trained)
    for key in gradients:
        expected = flat(case[f"grad.{key}"])
        if key == WITHOUT_GRADIENT:
            expected, scale = torch.zeros_like(expected), case[f"grad.{key[:-4]}weight"]
        else:
            scale = expected
        atol = tolerances["grad_max_abs_over_absmax"] * float(scale.abs().max())
        assert_near(tensors[our_name(key)].grad, expected, atol)
    optimizer_class, arguments = SGD
    assert arguments == {name: case.info["settings"][name] for name in ("momentum", "weight_decay")}
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer_class(parameters, lr=case.info["settings"]["lr"], **arguments).step()
    after = [key.partition(".")[2] for key in case.tensors if key.startswith("after.") and "num_batches" not in key]
    assert len(after) == len(trained) + 2
    for key in after:
        expected = flat(case[f"after.{key}"])
        atol = tolerances["params_after_max_abs_over_absmax"] * float(expected.abs().max())
        assert_near(tensors[our_name(key)], expected, atol)
    assert_near(eval_logits(model, case), case["eval_logits_after"], tolerances["logits_after_step_atol"])
