"""Every preset on a card gives what it gives on the CPU, in every precision, and does not wait for the card."""

import contextlib
import copy
import functools

import pytest
import torch
from adapters import as_if_trained, fitted
from conftest import CLASS_NAMES, TINY_CLIP
from peft import get_peft_model

from clip_prompt_peft import PRESETS, CLIPForPromptClassification, CLIPPromptTuningConfig, method_config
from clip_prompt_peft.training.configs import PEFT_METHODS


pytestmark = pytest.mark.gpu

KINDS = [None, *PRESETS, *(name for name in PEFT_METHODS if name != "tip-adapter")]  # which nothing is trained of
# the dtype of autocast, the dtype of the frozen weights, and how far logits may be apart (of about 20)
PRECISIONS = {
    "fp32": (None, torch.float32, 2e-3),
    "bf16 autocast": (torch.bfloat16, torch.float32, 1.0),
    "fp16 autocast": (torch.float16, torch.float32, 0.25),
    "bf16 weights": (None, torch.bfloat16, 1.0),
}


@functools.cache
def load_model(preset):
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    config = CLIPPromptTuningConfig() if preset is None else method_config(preset, classifier)
    model = as_if_trained(fitted(get_peft_model(classifier, config)), std=0.02).train()
    for dropout in (part for part in model.modules() if isinstance(part, torch.nn.Dropout)):
        dropout.p = 0.0  # each device draws numbers of its own
    return model


def model_on(device, preset, dtype=torch.float32):
    model = copy.deepcopy(load_model(preset)).to(device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def step(model, pixel_values, labels, autocast=None):
    """Logits and loss of a step, and the gradient of everything that is trained as one vector."""
    model.zero_grad()
    device = pixel_values.device.type
    with torch.autocast(device, autocast) if autocast is not None else contextlib.nullcontext():
        # ProGrad's term changes the gradient, and has to be asked for
        output = model(pixel_values=pixel_values, labels=labels, return_loss_terms=True)
    output.loss.backward()
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return output.logits.detach().float(), output.loss.detach(), torch.cat(gradients)


@contextlib.contextmanager
def no_waiting(device):
    """Raises where the host waits for the card."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", KINDS)
def test_a_step_is_that_of_the_cpu(device, preset, precision, pixel_values, labels):
    autocast, dtype, tolerance = PRECISIONS[precision]
    expected_logits, expected_loss, expected_gradient = step(model_on("cpu", preset), pixel_values, labels)
    logits, loss, gradient = step(
        model_on(device, preset, dtype), pixel_values.to(device), labels.to(device), autocast
    )
    assert logits.device.type == device.type
    torch.testing.assert_close(logits.cpu(), expected_logits, rtol=0.02, atol=tolerance)
    torch.testing.assert_close(loss.cpu().float(), expected_loss, rtol=0.1, atol=tolerance)
    alike = torch.cosine_similarity(gradient.cpu(), expected_gradient, dim=0)
    assert gradient.isfinite().all() and alike > (0.999 if precision == "fp32" else 0.9)


@pytest.mark.parametrize("preset", KINDS)
def test_the_host_does_not_wait_in_a_step(device, preset, pixel_values, labels):
    model = model_on(device, preset)
    pixel_values, labels = pixel_values.to(device), labels.to(device)
    step(model, pixel_values, labels)  # prompts, masks and the teacher's embeddings are made once
    with no_waiting(device):
        model(pixel_values=pixel_values, labels=labels, return_loss_terms=True).loss.backward()
