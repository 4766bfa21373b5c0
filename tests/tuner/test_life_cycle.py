"""One adapter through its whole life, in every model that has a CLIP text tower."""

import re

import pytest
import torch
from adapters import layer_of, randomize, vectors_of
from cases import MERGED
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


NUM_VECTORS = 4  # "a photo of a"


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


# Injection and training


def test_an_untrained_adapter_is_the_base_model(case):
    expected = case.output(case.base())
    model = get_peft_model(case.base(), CLIPPromptTuningConfig()).eval()
    assert torch.equal(case.output(model), expected)


def test_injection_leaves_every_base_tensor_where_it_was(case):
    base = case.base()
    before = {value.data_ptr(): value.clone() for value in base.state_dict().values()}
    model = get_peft_model(base, CLIPPromptTuningConfig())
    after = {value.data_ptr(): value for name, value in model.state_dict().items() if "learnable" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[pointer]) for pointer, value in after.items())


def test_only_the_vectors_are_trained(case, capsys):
    model = case.tuned()
    width = layer_of(model).weight.shape[1]
    total = sum(parameter.numel() for parameter in model.parameters())
    model.print_trainable_parameters()
    printed = re.sub(",", "", capsys.readouterr().out)
    assert f"trainable params: {NUM_VECTORS * width} || all params: {total}" in printed
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == [vectors_of(model)]


def test_a_training_step_changes_the_vectors_and_no_bit_of_the_base_model(case):
    model = case.tuned().train()
    before, old_loss = snapshot(model), case.loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    old_loss.backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert [name.rpartition(".learnable_embeddings.")[2] for name in changed] == ["default"]
    assert case.loss(model).item() < old_loss.item()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(case, use_reentrant):
    model = case.tuned().train()
    case.loss(model).backward()
    expected = vectors_of(model).grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    case.loss(model).backward()
    torch.testing.assert_close(vectors_of(model).grad, expected, rtol=1e-5, atol=1e-6)


# Several adapters


def test_adapters_are_added_switched_and_deleted(case):
    model = case.tuned()
    first = case.output(model)
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    assert torch.equal(case.output(model), first)  # not active yet
    assert not vectors_of(model, "second").requires_grad

    randomize(model, "second", seed=1)
    model.set_adapter("second")
    second = case.output(model)
    assert not torch.equal(second, first)
    assert vectors_of(model, "second").requires_grad and not vectors_of(model).requires_grad

    model.delete_adapter("default")  # an inactive one
    assert model.active_adapters == ["second"] and list(model.peft_config) == ["second"]
    assert torch.equal(case.output(model), second)


def test_deleting_the_active_adapter_activates_another_one(case):
    model = case.tuned()
    first = case.output(model)
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted. Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(case.output(model), first)


def test_deleting_the_last_adapter_leaves_the_base_model(case):
    model = case.tuned()
    model.delete_adapter("default")
    assert torch.equal(case.output(model.base_model.model), case.output(case.base()))


def test_unknown_and_repeated_adapter_names_are_refused(case):
    model = case.tuned()
    with pytest.raises(ValueError, match="nobody not found"):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="nobody does not exist"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", CLIPPromptTuningConfig())
    with pytest.raises(ValueError, match="no adapter 'nobody' to merge"):
        model.merge_and_unload(adapter_names=["nobody"])


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_others_as_they_were(case):
    model = case.tuned()
    before = case.output(model)
    with pytest.raises(ValueError, match="the text tower has 77 positions"):
        model.add_adapter("long", CLIPPromptTuningConfig(num_virtual_tokens=76))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(case.output(model), before)


def test_transformers_adds_switches_disables_and_deletes_adapters(case):
    model = case.base()
    base = case.output(model)
    model.add_adapter(CLIPPromptTuningConfig())
    randomize(model)
    first = case.output(model)
    model.add_adapter(CLIPPromptTuningConfig(num_virtual_tokens=2), adapter_name="second")
    randomize(model, "second", seed=1)
    assert not torch.equal(case.output(model), first)
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)
    model.disable_adapters()
    assert torch.equal(case.output(model), base)
    model.enable_adapters()
    assert torch.equal(case.output(model), first)
    model.delete_adapter(["default", "second"])
    assert torch.equal(case.output(model), base)


# Disabling, merging, unloading


def test_a_disabled_adapter_leaves_the_base_model_bit_for_bit(case):
    model = case.tuned()
    tuned, base = case.output(model), case.output(case.base())
    with model.disable_adapter():
        assert torch.equal(case.output(model), base)
    assert not torch.equal(tuned, base)
    assert torch.equal(case.output(model), tuned)


def test_a_merged_adapter_gives_the_same_output_and_comes_out_bit_for_bit(case):
    model = case.tuned()
    tuned, before = case.output(model), snapshot(model)
    model.merge_adapter()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert [name.rpartition(".base_layer.")[2] for name in changed] == ["position_embedding.weight"]
    torch.testing.assert_close(case.output(model), tuned, **MERGED)
    model.unmerge_adapter()
    assert_same(model.state_dict(), before)
    assert torch.equal(case.output(model), tuned)


def test_merging_twice_is_merging_once(case):
    model = case.tuned()
    model.merge_adapter()
    once = snapshot(model)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert_same(model.state_dict(), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_merged_model_is_the_base_model_while_disabled(case):
    model = case.tuned()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(case.base()))


def test_a_merged_adapter_is_not_deleted(case):
    model = case.tuned()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete .*merged"):
        model.delete_adapter("default")


def test_the_adapter_to_merge_is_chosen_by_name(case):
    model = case.tuned()
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    randomize(model, "second", seed=1)
    model.set_adapter("second")
    second = case.output(model)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(case.output(model), second, **MERGED)
    assert model.get_model_status().merged_adapters == ["second"]


def test_merge_and_unload_gives_the_plain_model_with_the_tuned_output(case):
    model = case.tuned()
    tuned = case.output(model)
    merged = model.merge_and_unload()
    assert type(merged) is case.model_class
    assert merged.state_dict().keys() == case.base().state_dict().keys()
    torch.testing.assert_close(case.output(merged), tuned, **MERGED)


@pytest.mark.parametrize("is_merged", [False, True])
def test_unload_gives_the_base_model_back_bit_for_bit(case, is_merged):
    model = case.tuned()
    if is_merged:
        model.merge_adapter()
    base = model.unload()
    assert type(base) is case.model_class
    assert_same(base.state_dict(), case.base().state_dict())
    assert torch.equal(case.output(base), case.output(case.base()))


def test_an_unloaded_model_takes_a_new_adapter(case):
    model = get_peft_model(case.tuned().unload(), CLIPPromptTuningConfig())
    assert torch.equal(case.output(model), case.output(case.base()))


def test_peft_reports_the_state_of_layer_and_model(case):
    model = case.tuned()
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    (layer,) = model.get_layer_status()
    assert layer.module_type == "clip_prompt_tuning.CLIPTextLearnableEmbeddings"
    assert layer.available_adapters == ["default", "second"]
    assert layer.active_adapters == ["default"] and layer.merged_adapters == []
    assert layer.requires_grad == {"default": True, "second": False}
    status = model.get_model_status()
    assert status.enabled is True and status.num_adapter_layers == 1
    assert status.trainable_params == vectors_of(model).numel()
    assert set(status.peft_types.values()) == {"CLIP_PROMPT_TUNING"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
