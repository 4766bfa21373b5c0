"""Adapters in models that torch has wrapped or transforms: compiled, checkpointed, sharded, functional."""

import copy

import pytest
import torch
from adapters import as_if_trained, logits_of
from cases import new_classifier, tuned_classifier
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from clip_prompt_peft import CLIPPromptTuningConfig


DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
KINDS = {
    "text": {},
    "class_specific": {"class_specific": True},
    "middle": {"class_token_position": "middle"},
    "coupled": {**DEEP, "vision_prompts_from_text": True},
    "image_conditioned": {"image_conditioned": True},
    "class_aware": {"class_aware_layer": 1},
}


@pytest.fixture(params=KINDS)
def fields(request):
    return KINDS[request.param]


def wrap_layers(model, wrap):
    for tower in (model.text_model, model.vision_model):
        for index, layer in enumerate(tower.encoder.layers):
            tower.encoder.layers[index] = wrap(layer)


# Names


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
@pytest.mark.parametrize("place", ["", "base_model.model.", "text_model.", "encoder.layers.1."])
def test_tensors_are_found_whatever_wrappers_have_put_into_their_names(wrapper, place, pixel_values):
    model = tuned_classifier(**DEEP)
    state = get_peft_model_state_dict(model)
    renamed = {
        name.replace(place, f"{place}{wrapper}.", 1) if place else f"{wrapper}.{name}": value
        for name, value in state.items()
    }
    assert renamed.keys() != state.keys()
    loaded = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**DEEP)).eval()
    assert not set_peft_model_state_dict(loaded, renamed).unexpected_keys
    assert torch.equal(logits_of(loaded, pixel_values), logits_of(model, pixel_values))


# Compiled


@pytest.mark.parametrize("fields", [{}, DEEP], ids=["text", "deep"])
def test_an_adapter_is_put_into_a_compiled_model_saved_from_it_and_loaded_into_another(fields, tmp_path, pixel_values):
    """Never called, which would compile it for a long time: the compiled model shares its modules with this one."""
    base, other, plain = new_classifier(), new_classifier(), new_classifier()
    as_if_trained(get_peft_model(torch.compile(base), CLIPPromptTuningConfig(**fields))).save_pretrained(tmp_path)
    expected = logits_of(base.eval(), pixel_values)
    assert not torch.allclose(expected, logits_of(plain.eval(), pixel_values))
    for model in (torch.compile(other), plain):
        PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits_of(other.eval(), pixel_values), expected)
    assert torch.equal(logits_of(plain.eval(), pixel_values), expected)


@pytest.mark.parametrize("fields", [{}, DEEP], ids=["text", "deep"])
def test_an_adapter_whose_layers_were_compiled_one_by_one_is_loaded_without_them(fields, tmp_path, pixel_values):
    model = tuned_classifier(**fields)
    expected = logits_of(model, pixel_values)
    wrap_layers(model.get_base_model(), lambda layer: torch.compile(layer, backend="eager"))
    model.save_pretrained(tmp_path)  # compiled when it is first called, which takes its time
    loaded = PeftModel.from_pretrained(new_classifier(), tmp_path).eval()
    assert torch.equal(logits_of(loaded, pixel_values), expected)
    again = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields), adapter_name="first").eval()
    wrap_layers(again.get_base_model(), lambda layer: torch.compile(layer, backend="eager"))
    again.load_adapter(tmp_path, "second")
    state = sorted(get_peft_model_state_dict(again, adapter_name="second").items())
    for (_, value), (_, saved) in zip(state, sorted(get_peft_model_state_dict(model).items()), strict=True):
        assert torch.equal(value, saved)


# Checkpointed by torch's own wrapper


def test_layers_in_torchs_checkpoint_wrapper_train_and_load(tmp_path, pixel_values, labels):
    plain = tuned_classifier(**DEEP)
    plain.save_pretrained(tmp_path)
    expected = logits_of(plain, pixel_values)
    base = new_classifier()
    wrap_layers(base, checkpoint_wrapper)
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits_of(model, pixel_values), expected)
    for one in (plain, model):
        one.train()(pixel_values=pixel_values, labels=labels).loss.backward()
    gradients = [parameter.grad for parameter in plain.parameters() if parameter.requires_grad]
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for gradient, other in zip(gradients, found, strict=True):
        torch.testing.assert_close(other, gradient)


def test_an_adapter_of_which_a_wrapper_hides_tensors_is_not_saved_in_part(tmp_path):
    """peft leaves them out without a word, those of LoRA, too."""
    model = tuned_classifier(**DEEP)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    wrap_layers(model.get_base_model(), checkpoint_wrapper)
    with pytest.raises(ValueError, match="is not saved, since only .* of its 4 tensors were found"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


# Functional


def call(model, tensors, pixel_values):
    return torch.func.functional_call(model, tensors, (), {"pixel_values": pixel_values}).logits


def some_tensors(model, *shape):
    """Other values for all tensors that are trained, by name."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value + 0.5 * torch.randn(*shape, *value.shape) for name, value in trained.items()}


@pytest.mark.parametrize("training", [False, True])
def test_a_functional_call_uses_the_tensors_that_it_is_given_and_leaves_the_model_as_it_was(
    fields, training, pixel_values
):
    model = tuned_classifier(**fields)
    before = logits_of(model, pixel_values)
    tensors = some_tensors(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(call(model, tensors, pixel_values), logits_of(twin, pixel_values))
    model.train(training)
    gradients = torch.func.grad(lambda tensors: call(model, tensors, pixel_values).square().mean())(tensors)
    twin.train(training)(pixel_values=pixel_values).logits.square().mean().backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits_of(model.eval(), pixel_values), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [False, True])
def test_vmap_over_several_adapters_gives_what_each_of_them_gives(fields, training, pixel_values):
    model = tuned_classifier(**fields)
    before = logits_of(model, pixel_values)
    tensors = some_tensors(model, 2)
    model.train(training)
    with torch.no_grad():
        together = torch.func.vmap(lambda tensors: call(model, tensors, pixel_values))(tensors)
        for index in range(2):
            alone = call(model, {name: value[index] for name, value in tensors.items()}, pixel_values)
            torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model.eval(), pixel_values), before)


@pytest.mark.parametrize("training", [False, True])
def test_the_first_call_of_a_model_may_be_a_functional_one(fields, training, pixel_values):
    """Prompts and inputs of the text tower are made in it, and kept."""
    model, twin = tuned_classifier(**fields).train(training), tuned_classifier(**fields)
    twin.load_state_dict(model.state_dict())
    tensors = some_tensors(model)
    torch.func.grad(lambda tensors: call(model, tensors, pixel_values).square().mean())(tensors)
    torch.testing.assert_close(logits_of(model.eval(), pixel_values), logits_of(twin, pixel_values))
