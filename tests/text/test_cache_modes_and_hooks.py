"""What is kept between calls serves callers in other modes, and hooks on the text tower see every call."""

import pytest
import torch
from adapters import as_if_trained, logits_of
from cases import new_classifier
from peft import get_peft_model
from torch.nn.modules import module as of_all_modules

from clip_prompt_peft import CLIPPromptTuningConfig


DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
KINDS = {
    "shared": {},
    "class_specific": {"class_specific": True},
    "middle": {"class_token_position": "middle"},
    "image_conditioned": {"image_conditioned": True},
    "class_aware": {"class_aware_layer": 1},
    "coupled": {**DEEP, "vision_prompts_from_text": True},
    "with_teacher": {"regularizer": "kgcoop"},
}
MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(params=KINDS)
def fields(request):
    return KINDS[request.param]


def tuned_classifier(**fields):
    torch.manual_seed(0)
    return as_if_trained(get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields)).eval())


def loss_and_gradients(model, pixel_values, labels):
    loss = model.train()(pixel_values=pixel_values, labels=labels).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["auto", "cut", "plain"])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_trains_as_if_it_had_not_been_called_in_another_mode(
    fields, mode, path, training, pixel_values, labels
):
    expected = loss_and_gradients(tuned_classifier(**fields), pixel_values, labels)
    model = tuned_classifier(**fields).train(training)
    model.get_base_model().class_encoder.path = path
    with MODES[mode]():
        model(pixel_values=pixel_values, labels=labels)
    for value, wanted in zip(loss_and_gradients(model, pixel_values, labels), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        result = model.eval()(pixel_values=pixel_values).logits
    torch.testing.assert_close(result, logits_of(tuned_classifier(**fields), pixel_values), rtol=1e-4, atol=1e-4)


def test_a_default_device_is_not_that_of_the_prompts(fields, pixel_values):
    model = tuned_classifier(**fields)
    expected = logits_of(tuned_classifier(**fields), pixel_values)
    with torch.device("meta"):
        torch.testing.assert_close(logits_of(model, pixel_values), expected)
    torch.testing.assert_close(logits_of(model, pixel_values), expected)


def test_class_embeddings_that_were_set_in_inference_mode_take_part_in_training(pixel_values, labels):
    classifier = new_classifier()
    with torch.inference_mode():
        classifier.set_class_embeds(classifier.get_class_embeds())
    classifier(pixel_values=pixel_values, labels=labels).loss.backward()
    assert classifier.visual_projection.weight.grad is not None


# Hooks


def parts_of_the_text_side(model):
    text_model = model.text_model
    embeddings = text_model.embeddings
    return [text_model, embeddings, embeddings.token_embedding, text_model.encoder.layers[0], model.text_projection]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("adapter", [False, True])
def test_a_hook_fires_in_every_evaluation_with_one_prompt_in_each_sequence(index, adapter, pixel_values):
    model = tuned_classifier().get_base_model() if adapter else new_classifier()
    expected = logits_of(model, pixel_values)
    shapes = []
    part = parts_of_the_text_side(model)[index]
    handle = part.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(len(getattr(output, "pooler_output", output))),
        with_kwargs=True,
    )
    for count in (1, 2):
        torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=1e-4, atol=1e-4)
        assert shapes == [len(model.class_names)] * count
    handle.remove()
    assert torch.equal(logits_of(model, pixel_values), expected)


def test_a_hook_that_changes_the_output_takes_effect_and_leaves_no_trace(pixel_values):
    model = new_classifier()
    expected = logits_of(model, pixel_values)
    handles = [
        model.text_projection.register_forward_hook(lambda module, args, output: output.flip(0)),
        model.text_model.register_forward_pre_hook(lambda module, args: None),
    ]
    torch.testing.assert_close(logits_of(model, pixel_values), expected.flip(1), rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits_of(model, pixel_values), expected)


def test_backward_hooks_see_one_prompt_in_each_sequence(pixel_values, labels):
    model = tuned_classifier().train()
    shapes = []  # torch calls no backward hook of a module that returns a ModelOutput, such as the text model
    model.get_base_model().text_model.final_layer_norm.register_full_backward_hook(
        lambda module, inputs, outputs: shapes.append(len(outputs[0]))
    )
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    assert shapes == [4]


def test_hooks_for_all_modules_see_the_text_model_in_every_evaluation(pixel_values):
    model = new_classifier()
    logits_of(model, pixel_values)
    calls = []
    handle = of_all_modules.register_module_forward_hook(lambda module, args, output: calls.append(module))
    try:
        logits_of(model, pixel_values)
        logits_of(model, pixel_values)
    finally:
        handle.remove()
    assert sum(module is model.text_model for module in calls) == 2


def test_hidden_states_can_be_asked_for_without_losing_the_fast_path(pixel_values):
    model = new_classifier()
    model.text_model(torch.tensor([[0, 1]]), output_hidden_states=True)
    logits_of(model, pixel_values)
    kept = model.class_encoder._embeds.latest
    logits_of(model, pixel_values)
    assert model.class_encoder._embeds.latest[1] is kept[1]
