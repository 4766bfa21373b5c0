"""Adapter files that do not fit the model, or are damaged."""

import pytest
import torch
from adapters import change_config, change_tensors, tuned, vectors_of
from conftest import TINY_CLIP
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from clip_prompt_peft import AutoPeftModelForPromptClassification


def rename(folder, new_name):
    file = folder / "adapter_model.safetensors"
    save_file({new_name(key): value for key, value in load_file(file).items()}, file)


@pytest.fixture
def adapter(clip, tmp_path):
    tuned(clip).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def base():
    return CLIPModel.from_pretrained(TINY_CLIP).eval()


def test_vectors_are_found_at_the_module_path_of_other_versions_of_transformers(base, adapter):
    (saved,) = load_file(adapter / "adapter_model.safetensors").values()
    rename(adapter, lambda key: key.replace("text_model.", "text_model.text_model."))  # before 5.6
    loaded = PeftModel.from_pretrained(base, adapter)
    assert torch.equal(vectors_of(loaded), saved)


def test_vectors_of_another_width_are_refused_with_both_shapes(base, adapter):
    change_tensors(adapter, lambda vectors: vectors[:, :64])
    with pytest.raises(ValueError, match=r"shape \(4, 64\), but .* ask for \(4, 128\) .* trained on .*tiny_clip"):
        PeftModel.from_pretrained(base, adapter)


def test_another_number_of_vectors_than_the_configuration_says_is_refused(base, adapter):
    change_tensors(adapter, lambda vectors: vectors[:3])
    with pytest.raises(ValueError, match=r"shape \(3, 128\), but .* ask for \(4, 128\)"):
        PeftModel.from_pretrained(base, adapter)


def test_a_file_without_the_vectors_is_refused_with_what_it_holds(base, adapter):
    rename(adapter, lambda key: "something.else")
    with pytest.raises(ValueError, match=r"hold no .*learnable_embeddings.*, only \['something.else'\]; .* damaged"):
        PeftModel.from_pretrained(base, adapter)


def test_an_adapter_of_a_larger_vocabulary_is_refused(base, adapter):
    change_config(adapter, replaced_token_ids=[320, 821, 533, 49000])
    with pytest.raises(
        ValueError, match="names token 49000, but the model's vocabulary has 3072 .* another base model"
    ):
        PeftModel.from_pretrained(base, adapter)


def test_an_adapter_of_a_longer_text_tower_is_refused(base, adapter):
    change_config(adapter, start_idx=90)
    with pytest.raises(ValueError, match="reach position 93, but the text tower has 77 positions"):
        PeftModel.from_pretrained(base, adapter)


def test_a_damaged_configuration_is_refused(base, adapter):
    change_config(adapter, replaced_token_ids=[320])
    with pytest.raises(ValueError, match=r"must be 4 token ids, .* got \[320\]; .* configuration is damaged"):
        PeftModel.from_pretrained(base, adapter)


def load_with_peft(base, adapter):
    return PeftModel.from_pretrained(base, adapter)


def load_with_transformers(base, adapter):
    base.load_adapter(adapter)


@pytest.mark.parametrize("load", [load_with_peft, load_with_transformers])
def test_a_truncated_file_is_refused(base, adapter, load):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match="not fully covered"):
        load(base, adapter)


def test_transformers_refuses_vectors_of_another_width(base, adapter, texts):
    change_tensors(adapter, lambda vectors: vectors[:, :64])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        base.load_adapter(adapter)
    with pytest.raises(ValueError, match="none were loaded"):  # should anyone go on with what is in the model now
        base.get_text_features(**texts)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_weights_that_transformers_did_not_find_are_not_used(base, adapter, texts, is_trainable):
    rename(adapter, lambda key: "something.else")
    base.load_adapter(adapter, is_trainable=is_trainable)  # transformers itself only warns
    with pytest.raises(
        ValueError, match="'default' belongs to saved weights, but none were loaded: the file is damag"
    ):
        base.get_text_features(**texts)


def test_pickled_weights_are_refused_by_the_auto_class(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors. .* pickles, which can run code"):
        AutoPeftModelForPromptClassification.from_pretrained(adapter)


def test_pickled_weights_are_refused_by_transformers(base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        base.load_adapter(adapter)


def test_an_unknown_method_stays_unknown(adapter, base):
    change_config(adapter, peft_type="NO_SUCH_METHOD")
    with pytest.raises((KeyError, ValueError), match="NO_SUCH_METHOD"):
        PeftModel.from_pretrained(base, adapter)
