"""An adapter leaves one model and arrives in another: by file, by copy, by compilation."""

import copy
import io
import shutil

import pytest
import torch
from adapters import layer_of, randomize, vectors_of
from cases import MERGED, TEXTS
from conftest import needs_compile
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPTextModel

from clip_prompt_peft import CLIPPromptTuningConfig


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
        assert torch.equal(layer_of(again).position_embedding.weight, layer_of(model).position_embedding.weight)


@pytest.mark.slow
@needs_compile
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


@pytest.mark.slow
@needs_compile
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
