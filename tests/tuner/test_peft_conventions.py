"""What peft's tests ask of every method, as far as no other file shows it; docs/reliability.md has the whole list."""

import re
import warnings

import pytest
import torch
from adapters import change_config, logits_of, randomize, tuned, vectors_of
from cases import new_classifier, tuned_classifier
from conftest import TINY_CLIP
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    convert_to_lora,
    get_base_model_state_dict,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import CLIPModel

from clip_prompt_peft import CLIPPromptTuningConfig


# A layer of every kind
DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
KINDS = {
    "text": {},
    "deep": DEEP,
    "coupled": {**DEEP, "vision_prompts_from_text": True},
    "meta_net": {"image_conditioned": True},
    "class_aware": {"class_aware_layer": 1},
    "with_module": {"modules_to_save": ["text_projection"]},
    "vision": {"num_virtual_tokens": 0, "num_vision_virtual_tokens": 2},
}


@pytest.fixture(params=KINDS)
def fields(request):
    return KINDS[request.param]


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


# Files


def test_selected_adapters_alone_are_saved_and_unknown_ones_refused(clip, tmp_path):
    model = tuned(clip)
    model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "other"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_weights_are_written_as_a_pickle_only_if_asked_for_and_peft_reads_them(clip, tmp_path):
    model = tuned(clip)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(TINY_CLIP), tmp_path)
    assert torch.equal(vectors_of(loaded), vectors_of(model))


def test_a_configuration_of_a_later_version_is_read_without_its_unknown_fields(clip, tmp_path):
    tuned(clip).save_pretrained(tmp_path)
    change_config(tmp_path, from_the_future=1)
    with pytest.warns(UserWarning, match="from_the_future"):
        config = PeftConfig.from_pretrained(tmp_path)
        assert check_if_peft_model(str(tmp_path))
    assert type(config) is CLIPPromptTuningConfig


def test_a_configuration_is_rebuilt_from_its_dictionary(fields):
    config = CLIPPromptTuningConfig(**fields)
    assert PeftConfig.from_peft_type(**config.to_dict()) == config


@pytest.mark.parametrize(("low_cpu_mem_usage", "is_trainable"), [(False, False), (True, True)])
def test_a_loaded_adapter_requires_gradients_only_if_asked_to_and_lies_on_the_device(
    fields, tmp_path, low_cpu_mem_usage, is_trainable
):
    model = tuned_classifier(**fields)
    expected = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable, "torch_device": "cpu"}
    loaded = PeftModel.from_pretrained(new_classifier(), tmp_path, ephemeral_gpu_offload=False, **options)
    loaded.load_adapter(tmp_path, "other", **options)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(expected) * is_trainable
    for name in ("default", "other"):
        assert same(get_peft_model_state_dict(loaded, adapter_name=name), expected)


# State dicts


def test_the_base_models_state_dict_is_what_it_was(fields):
    expected = new_classifier().state_dict()
    assert same(
        get_base_model_state_dict(get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields))), expected
    )


@pytest.mark.parametrize(("by_state_dict", "low_cpu_mem_usage"), [(False, True), (True, False)])
def test_an_adapter_is_injected_without_a_peft_model(fields, pixel_values, by_state_dict, low_cpu_mem_usage):
    model = tuned_classifier(**fields)
    state = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    if by_state_dict and "modules_to_save" in fields:
        state = {name: value for name, value in state.items() if "text_projection" not in name}
    classifier = new_classifier()
    config = CLIPPromptTuningConfig(**fields)
    options = {"state_dict": state} if by_state_dict else {}
    inject_adapter_in_model(config, classifier, low_cpu_mem_usage=low_cpu_mem_usage, **options)
    assert ("meta" in {parameter.device.type for parameter in classifier.parameters()}) == low_cpu_mem_usage
    state = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(classifier, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits_of(classifier.eval(), pixel_values), logits_of(model, pixel_values))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("fields", [*KINDS.values(), {"num_virtual_tokens": 0, "num_vision_virtual_tokens": 2}])
def test_a_state_dict_says_what_to_wrap_also_in_a_compiled_model(fields, wrap, pixel_values):
    """Vision prompts alone have no tensor in the text embeddings, which still have to know template and classes."""
    model = tuned_classifier(**{**fields, "modules_to_save": None}) if fields.get("num_virtual_tokens") != 0 else None
    model = model or get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields)).eval()
    state = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    classifier = new_classifier()
    config = CLIPPromptTuningConfig(**{**fields, "modules_to_save": None})
    with warnings.catch_warnings():  # peft warns if configuration and tensors disagree
        if fields.get("num_virtual_tokens") != 0:
            warnings.simplefilter("error", RuntimeWarning)
        inject_adapter_in_model(config, wrap(classifier), state_dict=state)
    set_peft_model_state_dict(classifier, state)
    assert classifier.prompt_layout.class_names == classifier.config.class_names
    torch.testing.assert_close(logits_of(classifier.eval(), pixel_values), logits_of(model, pixel_values))


# What is trained


def test_gradients_are_switched_by_adapter_name(fields):
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields))
    model.add_adapter("other", CLIPPromptTuningConfig(**fields))

    def trained():
        names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return {re.sub(r"\.(default|other)", "", name) for name in names}

    expected = trained()
    assert expected
    model.set_requires_grad("default", requires_grad=False)
    assert trained() == set()
    model.set_requires_grad(["other"])
    assert trained() == expected
    model.set_requires_grad(["other"], requires_grad=False)  # set_adapter leaves inactive modules_to_save alone
    model.set_adapter("default", inference_mode=True)
    assert trained() == set() and model.active_adapters == ["default"]
    model.set_adapter("other")
    assert trained() == expected and model.active_adapters == ["other"]


def test_training_reaches_every_tensor_of_the_adapter_and_no_other_through_checkpoints(fields, pixel_values, labels):
    model = tuned_classifier(**fields).train()
    plain = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in plain.items()}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in plain)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    for name, parameter in plain.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_input_embeddings_require_gradients_only_after_being_asked_to(tokenizer):
    classifier = prepare_model_for_kbit_training(new_classifier())
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    input_ids = tokenizer("a photo", return_tensors="pt")["input_ids"]
    fresh = get_peft_model(new_classifier(), CLIPPromptTuningConfig())
    assert not fresh.get_input_embeddings()(input_ids).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(input_ids).requires_grad


def test_the_number_of_trained_parameters_is_reported(fields):
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(value.numel() for value in get_peft_model_state_dict(model).values())
    assert total == sum(parameter.numel() for parameter in model.parameters())


# Switching, deleting, unloading


def test_unloading_removes_every_trace_and_trained_modules_too(fields, pixel_values):
    zero_shot = logits_of(new_classifier(), pixel_values)
    model = tuned_classifier(**fields)
    assert not torch.allclose(logits_of(model, pixel_values), zero_shot)
    base = model.unload()
    assert not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert same(base.state_dict(), new_classifier().state_dict())
    assert torch.equal(logits_of(base, pixel_values), zero_shot)


def test_unloading_deep_prompts_unloads_lora_inside_of_their_layers(pixel_values):
    expected = logits_of(new_classifier(), pixel_values)
    classifier = new_classifier()
    classifier.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "towers")
    base = get_peft_model(classifier, CLIPPromptTuningConfig(**DEEP), adapter_name="prompts").unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert torch.equal(logits_of(base, pixel_values), expected)


def test_lora_inside_of_the_layers_of_an_inactive_deep_adapter_is_merged(pixel_values):
    classifier = new_classifier()
    classifier.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "towers")
    model = get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts").eval()
    randomize(model, "prompts")
    model.add_adapter("deep", CLIPPromptTuningConfig(**DEEP))
    expected = logits_of(model, pixel_values)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    torch.testing.assert_close(logits_of(merged, pixel_values), expected, rtol=0, atol=1e-4)


def test_all_layers_agree_on_what_follows_a_deleted_active_adapter(pixel_values):
    """The first of all that are left is "context"; the layers of deep prompts hold "deep" and "last" only."""
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig(), adapter_name="context").eval()
    randomize(model, "context")
    expected = logits_of(model, pixel_values)
    for name in ("deep", "last"):
        model.add_adapter(name, CLIPPromptTuningConfig(**DEEP))
    model.set_adapter("last")
    with pytest.warns(UserWarning, match="last was active which is now deleted"):
        model.delete_adapter("last")
    status = model.get_model_status()
    assert status.active_adapters == ["context"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.text_model.embeddings.learnable_embeddings.context"
    }
    assert torch.equal(logits_of(model, pixel_values), expected)


def test_layers_that_a_new_adapter_brings_while_adapters_are_disabled_are_disabled_too(pixel_values):
    zero_shot = logits_of(new_classifier(), pixel_values)
    model = tuned_classifier()
    with model.disable_adapter():
        model.add_adapter("deep", CLIPPromptTuningConfig(**DEEP))
        model.set_adapter("deep")
        assert model.get_model_status().enabled is False
        assert torch.equal(logits_of(model, pixel_values), zero_shot)
    assert model.get_model_status().enabled is True
    assert not torch.equal(logits_of(model, pixel_values), zero_shot)


def test_the_last_adapter_can_be_deleted(fields, pixel_values):
    model = tuned_classifier(**fields)
    model.delete_adapter("default")
    assert model.active_adapters == [] and model.peft_config == {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            assert module.active_adapters == []
    assert torch.equal(logits_of(model.base_model, pixel_values), logits_of(new_classifier(), pixel_values))


def test_disabling_can_be_nested(fields, pixel_values):
    model = tuned_classifier(**fields)
    expected, zero_shot = logits_of(model, pixel_values), logits_of(new_classifier(), pixel_values)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits_of(model, pixel_values), zero_shot)
        assert torch.equal(logits_of(model, pixel_values), zero_shot)
    assert torch.equal(logits_of(model, pixel_values), expected)


def test_an_adapter_is_renamed_by_copying_its_tensors(fields, pixel_values, tmp_path):
    model = tuned_classifier(**fields)
    expected = logits_of(model, pixel_values)
    model.add_adapter("new", model.peft_config["default"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="default"), adapter_name="new")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(logits_of(model, pixel_values), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new_classifier(), tmp_path / "new", adapter_name="newer").eval()
    assert torch.equal(logits_of(loaded, pixel_values), expected)


def test_merging_in_inference_mode_leaves_a_model_that_can_be_trained(pixel_values, labels):
    model = tuned_classifier()
    expected = logits_of(model, pixel_values)
    with torch.inference_mode():
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(logits_of(model, pixel_values), expected)
    model.train()(pixel_values=pixel_values, labels=labels).loss.backward()
    assert vectors_of(model).grad is not None
    with torch.inference_mode():
        merged = model.merge_and_unload()
    again = get_peft_model(merged, CLIPPromptTuningConfig()).train()
    again(pixel_values=pixel_values, labels=labels).loss.backward()
    assert vectors_of(again).grad is not None


def test_tensors_that_were_left_on_the_meta_device_are_not_used(fields, pixel_values):
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields), low_cpu_mem_usage=True).eval()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        logits_of(model, pixel_values)


# Reports


def test_layers_show_themselves_and_are_found_by_name(fields):
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields))
    names = [status.name for status in get_layer_status(model) if status.module_type.startswith("clip_prompt_tuning")]
    assert sorted(names) == sorted(f"model.{name}" for name in model.targeted_module_names)
    assert repr(model).count("clip_prompt_tuning.") == len(names)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    config = new_classifier().config
    for layer in (layer for layer in layers if layer.adapter_layer_names):
        assert layer.out_features in (config.text_config.hidden_size, config.vision_config.hidden_size)
        assert layer.in_features in (layer.out_features, config.text_config.vocab_size)


# Other methods on the tables that prompts read


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["token_embedding"], init_lora_weights=False),
        LoraConfig(target_modules=["position_embedding"], init_lora_weights=False),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
        TrainableTokensConfig(target_modules=["token_embedding"], token_indices=[5, 6], init_weights=False),
    ],
    ids=["lora_token", "lora_position", "lora_linear", "trainable_tokens"],
)
def test_prompts_start_from_and_merge_with_the_embeddings_that_another_method_has_changed(config, pixel_values):
    classifier = new_classifier()
    classifier.add_adapter(config, "other")
    expected = logits_of(classifier.eval(), pixel_values)
    model = get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts").eval()
    torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=1e-4, atol=1e-4)
    randomize(model, "prompts")
    expected = logits_of(model, pixel_values)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), pixel_values), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "token_embedding"),
        ({}, "text_model.embeddings.position_embedding"),
        ({}, "embeddings"),
        ({}, "text_model"),
        (DEEP, "embeddings"),
        (DEEP, "encoder"),
        (DEEP, "self_attn"),
        (DEEP, "patch_embedding"),
        ({**DEEP, "vision_prompts_from_text": True}, "vision_model"),
        (KINDS["vision"], "text_model"),
    ],
)
def test_modules_to_save_in_or_around_what_prompts_wrap_are_refused_before_anything_changes(fields, name):
    """peft would train nothing, leave prompts out, or break off with half of the layers made."""
    classifier = new_classifier()
    expected = classifier.state_dict()
    config = CLIPPromptTuningConfig(**fields, modules_to_save=[name])
    with pytest.raises(ValueError, match=f"modules_to_save='{re.escape(name)}' names .* prompts are put into"):
        get_peft_model(classifier, config)
    assert same(classifier.state_dict(), expected)
    assert not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in classifier.modules())
    model = get_peft_model(classifier, CLIPPromptTuningConfig(**fields))
    with pytest.raises(ValueError, match="prompts are put into"):
        model.add_adapter("other", config)


@pytest.mark.parametrize("name", ["visual_projection", "text_projection", "vision_model", "final_layer_norm"])
def test_other_modules_are_trained_beside_text_prompts(name, pixel_values, labels):
    model = tuned_classifier(modules_to_save=[name]).train()
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) > 1 and all(parameter.grad is not None for parameter in trained)


def test_image_conditioned_prompts_find_the_width_in_a_module_around_a_clip_or_say_what_is_missing(clip):
    class Around(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    config = CLIPPromptTuningConfig(image_conditioned=True, tokenizer_name_or_path=TINY_CLIP)
    model = get_peft_model(Around(clip=clip), config)
    first = model.base_model.model.clip.text_model.embeddings.learnable_meta_in["default"]
    assert first.in_features == clip.config.projection_dim
    bare = CLIPModel.from_pretrained(TINY_CLIP)
    towers = Around(text=bare.text_model, image=bare.vision_model)
    for tower in (bare.text_model, bare.vision_model):
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config = None
    with pytest.raises(ValueError, match="projection_dim"):
        get_peft_model(towers, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in towers.modules())


# What is for LoRA alone says so


def test_what_peft_has_for_lora_only_is_refused_and_changes_nothing(clip, tmp_path):
    model = tuned(clip)
    model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(AttributeError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 2),
    ):
        pass
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    assert same(model.state_dict(), before)


def test_a_base_module_whose_name_looks_like_the_methods_is_none(clip, tokenizer, tmp_path):
    """`learnable_` is the prefix of our tensors: a base model may have such a module itself."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.learnable_head = nn.Linear(clip.config.projection_dim, 2)
            self.clip = clip

        def forward(self, **texts):
            return self.learnable_head(self.clip.get_text_features(**texts).pooler_output)

    model = tuned(Model(), tokenizer_name_or_path=TINY_CLIP)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.clip.text_model.embeddings.learnable_embeddings.default"
    ]
    model.save_pretrained(tmp_path)
    assert len(get_peft_model_state_dict(model)) == 1
    texts = tokenizer(["a photo of a cat."], return_tensors="pt")
    model(**texts).sum().backward()
    assert model.base_model.model.learnable_head.weight.grad is None
