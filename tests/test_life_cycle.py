"""One adapter through its whole life, in every model that has a CLIP text tower."""

import copy
import functools
import io
import re
import shutil

import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings


TEXTS = ["a photo of a animal.", "a photo of a fire truck.", "a photo of a sun."]
NUM_VECTORS = 4  # "a photo of a"
MERGED = {"rtol": 0, "atol": 1e-4}  # merging changes the order of two additions


@functools.cache
def load_base(model_class):
    kwargs = {"class_names": CLASS_NAMES} if model_class is CLIPForPromptClassification else {}
    return model_class.from_pretrained(TINY_CLIP, **kwargs).eval()


class Case:
    """One of the models, with inputs for it and the tensor of its output that is compared."""

    def __init__(self, model_class, tokenizer, pixel_values, labels):
        self.model_class = model_class
        texts = tokenizer(TEXTS, padding=True, return_tensors="pt")
        self.inputs = {
            CLIPModel: {**texts, "pixel_values": pixel_values, "return_loss": True},
            CLIPTextModelWithProjection: texts,
            CLIPTextModel: texts,
            CLIPForPromptClassification: {"pixel_values": pixel_values, "labels": labels},
        }[model_class]

    def base(self):
        return copy.deepcopy(load_base(self.model_class))

    def tuned(self, adapter_name="default", seed=0, **fields):
        """A base model with an adapter in it whose vectors are far from any word."""
        model = get_peft_model(self.base(), CLIPPromptTuningConfig(**fields), adapter_name=adapter_name)
        randomize(model, adapter_name, seed)
        return model.eval()

    def output(self, model):
        out = model(**self.inputs)
        for name in ("logits", "logits_per_image", "text_embeds", "pooler_output"):
            if getattr(out, name, None) is not None:
                return getattr(out, name)
        raise AssertionError(f"no output to compare in {type(out).__name__}")

    def loss(self, model):
        out = model(**self.inputs)
        return out.loss if getattr(out, "loss", None) is not None else out[0].square().mean()


@pytest.fixture(
    params=[CLIPModel, CLIPTextModelWithProjection, CLIPTextModel, CLIPForPromptClassification],
    ids=lambda model_class: model_class.__name__,
)
def case(request, tokenizer, pixel_values, labels):
    return Case(request.param, tokenizer, pixel_values, labels)


def layer_of(model):
    (layer,) = [module for module in model.modules() if isinstance(module, CLIPTextLearnableEmbeddings)]
    return layer


def vectors_of(model, adapter_name="default"):
    return layer_of(model).learnable_embeddings[adapter_name]


@torch.no_grad()
def randomize(model, adapter_name="default", seed=0):
    vectors = vectors_of(model, adapter_name)
    vectors.copy_(0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))


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


# Saving and loading


def test_an_adapter_file_is_one_small_tensor(case, tmp_path):
    model = case.tuned()
    model.save_pretrained(tmp_path)
    (saved,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert torch.equal(saved, vectors_of(model))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < saved.nbytes + 512


@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "mine"}])
def test_peft_loads_what_it_saved(case, tmp_path, kwargs):
    model = case.tuned()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, **kwargs).eval()
    assert torch.equal(case.output(loaded), case.output(model))
    assert vectors_of(loaded, kwargs.get("adapter_name", "default")).requires_grad == ("is_trainable" in kwargs)


def test_an_adapter_is_loaded_beside_another_one_under_a_new_name(case, tmp_path):
    model = case.tuned()
    model.save_pretrained(tmp_path)
    other = case.tuned(seed=1, num_virtual_tokens=2)
    before = case.output(other)
    other.load_adapter(tmp_path, adapter_name="saved")
    assert torch.equal(case.output(other), before)
    other.set_adapter("saved")
    assert torch.equal(case.output(other), case.output(model))


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_transformers_loads_what_peft_saved(case, tmp_path, adapter_name):
    model = case.tuned()
    model.save_pretrained(tmp_path)
    loaded = case.base()
    loaded.load_adapter(tmp_path, adapter_name=adapter_name)
    assert loaded.active_adapters() == [adapter_name]
    assert torch.equal(case.output(loaded), case.output(model))


def test_peft_loads_what_transformers_saved(case, tmp_path):
    model = case.base()
    model.add_adapter(CLIPPromptTuningConfig(), adapter_name="mine")
    randomize(model, "mine")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.output(loaded), case.output(model))


def test_training_goes_on_from_a_saved_adapter(case, tmp_path):
    model = case.tuned()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    case.loss(model).backward()
    case.loss(loaded).backward()
    assert torch.equal(vectors_of(loaded).grad, vectors_of(model).grad)


# Names that stand in the names of parameters too: peft tells by structure, not by name


@pytest.mark.parametrize("name", ["embeddings", "learnable", "learnable_embeddings", "text_model", "e", "weight"])
def test_an_adapter_name_may_be_part_of_a_parameter_name(case, tmp_path, name):
    model = case.tuned(adapter_name=name)
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == [vectors_of(model, name)]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(case.output(loaded), case.output(model))
    other = case.base()
    other.load_adapter(tmp_path / name, adapter_name=name)
    assert torch.equal(case.output(other), case.output(model))


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


# Further modules


def test_a_further_module_is_trained_and_saved_with_the_vectors(case, tmp_path):
    name = "final_layer_norm" if case.model_class is CLIPTextModel else "text_projection"
    model = case.tuned(modules_to_save=[name])
    module = model.base_model.model.get_submodule(name)
    frozen, trained = module.original_module.weight, module.modules_to_save["default"].weight
    assert trained.requires_grad and not frozen.requires_grad
    torch.nn.init.normal_(trained, std=0.1)
    model.save_pretrained(tmp_path)
    expected = case.output(model)
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, **kwargs).eval()
        assert torch.equal(case.output(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(case.base()))
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_submodule(name).weight, trained)
    torch.testing.assert_close(case.output(merged), expected, **MERGED)


# Copies and compilation


def test_a_deep_copy_lives_its_own_life(case):
    model = case.tuned()
    expected = case.output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.output(twin), expected)
    randomize(twin, seed=1)
    assert not torch.equal(case.output(twin), expected)
    assert torch.equal(case.output(model), expected)


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_pickled_model_comes_back(case, is_merged):
    model = case.tuned()
    if is_merged:
        model.merge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(case.output(again), case.output(model))
    if is_merged:
        model.unmerge_adapter()
        again.unmerge_adapter()
        assert_same(again.state_dict(), model.state_dict())


def test_a_compiled_model_is_one_graph_and_follows_the_active_adapter(case):
    torch._dynamo.reset()
    model = case.tuned(num_virtual_tokens=2)
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), torch.nn.ModuleList):
            module.layers = module.layers[:1]  # compiling takes its time for every layer
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # before compiling, since the classifier builds its prompts when it first needs them
    tuned = case.output(model)
    torch.testing.assert_close(case.output(compiled), tuned)
    with model.disable_adapter():
        base = case.output(model)
        torch.testing.assert_close(case.output(compiled), base)
    assert not torch.allclose(tuned, base)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_the_compiled_embeddings_have_the_same_output_and_gradient(tokenizer, clip):
    torch._dynamo.reset()
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    randomize(model)
    layer, input_ids = layer_of(model), tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    expected = layer(input_ids)
    expected.square().sum().backward()
    gradient = vectors_of(model).grad.clone()
    model.zero_grad()
    output = torch.compile(layer, fullgraph=True)(input_ids)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(vectors_of(model).grad, gradient)
