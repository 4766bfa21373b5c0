"""The configuration: what it accepts, what an injection fills in, what a file brings back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import PeftConfig, PeftModel, PromptTuningInit, get_peft_model
from transformers import CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


IDS_OF_A_PHOTO_OF_A = [320, 821, 533, 320]  # of the embedded tokenizer


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": -3}, "num_virtual_tokens must be a positive integer, got -3"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens must be a positive integer, got 2.0"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens must be a positive integer, got '4'"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be a positive integer, got True"),
        ({"start_idx": -1}, "start_idx must be an integer of at least 0, or None .*begin token.*, got -1"),
        ({"start_idx": "1"}, "start_idx must be an integer of at least 0, or None .*, got '1'"),
        (
            {"prompt_tuning_init": "ZEROS"},
            "prompt_tuning_init must be one of 'TEXT', 'SAMPLE_VOCAB', 'RANDOM', got 'ZEROS'",
        ),
        ({"prompt_tuning_init": None}, "prompt_tuning_init must be one of .*, got None"),
        ({"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": "a photo"}, "only used with .*TEXT.*'RANDOM'"),
        ({"prompt_tuning_init_text": "  "}, "prompt_tuning_init_text must hold words, got '  '"),
        ({"prompt_tuning_init_text": 4}, "prompt_tuning_init_text must hold words, got 4"),
        ({"prompt_template": "a photo of a cat."}, "holds {} 0 times"),
        ({"prompt_template": "a {} of a {}."}, "holds {} 2 times"),
        ({"class_names": []}, "class_names is empty"),
        ({"class_names": ["cat", "cat"]}, "stand there twice"),
        ({"task_type": "SEQ_CLS"}, "task_type must be one of 'PROMPT_CLASSIFICATION', got 'SEQ_CLS'"),
        ({"num_virtual_tokens": 3, "replaced_token_ids": [1, 2], "padded_template": "{}"}, "must be 3 token ids"),
        ({"num_virtual_tokens": 1, "replaced_token_ids": [-1], "padded_template": "{}"}, "configuration is damaged"),
        ({"num_virtual_tokens": 1, "replaced_token_ids": "1", "padded_template": "{}"}, "configuration is damaged"),
        ({"num_virtual_tokens": 1, "replaced_token_ids": [1]}, "template must be a string"),
    ],
)
def test_a_bad_value_is_refused_with_a_message_that_shows_it(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPPromptTuningConfig(**fields)


def test_every_way_of_initialisation_is_accepted_as_string_and_as_member():
    for init in PromptTuningInit:
        assert CLIPPromptTuningConfig(prompt_tuning_init=init).prompt_tuning_init is init
        assert CLIPPromptTuningConfig(prompt_tuning_init=init.value).prompt_tuning_init is init


def test_an_injection_fills_in_what_follows_from_the_template(clip):
    config = get_peft_model(clip, CLIPPromptTuningConfig()).active_peft_config
    assert config.prompt_template == config.padded_template == "a photo of a {}."
    assert config.num_virtual_tokens == 4
    assert config.replaced_token_ids == config.init_token_ids == IDS_OF_A_PHOTO_OF_A
    assert config.class_names is None


def test_an_injection_fills_in_the_padded_template(clip):
    config = get_peft_model(clip, CLIPPromptTuningConfig(num_virtual_tokens=6)).active_peft_config
    assert config.prompt_template == "a photo of a {}."
    assert config.padded_template == "X X a photo of a {}."
    assert config.replaced_token_ids[2:] == IDS_OF_A_PHOTO_OF_A


def test_the_number_of_vectors_follows_from_the_init_text_first(clip):
    config = get_peft_model(clip, CLIPPromptTuningConfig(prompt_tuning_init_text="art of")).active_peft_config
    assert config.num_virtual_tokens == 2
    assert config.replaced_token_ids == IDS_OF_A_PHOTO_OF_A[:2]


def test_an_init_text_longer_than_the_template_pads_it(clip):
    config = CLIPPromptTuningConfig(prompt_tuning_init_text="a photo of one of the")
    assert get_peft_model(clip, config).active_peft_config.padded_template == "X X a photo of a {}."


def test_an_injection_into_the_classifier_takes_its_classes_and_its_template():
    model = CLIPForPromptClassification.from_pretrained(
        TINY_CLIP, class_names=CLASS_NAMES, prompt_template="a drawing of a {}."
    )
    config = get_peft_model(model, CLIPPromptTuningConfig()).active_peft_config
    assert config.class_names == CLASS_NAMES
    assert config.prompt_template == "a drawing of a {}."


def test_an_adapter_of_a_plain_clip_takes_the_classes_of_the_classifier_that_loads_it(clip, classifier, tmp_path):
    get_peft_model(clip, CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(classifier, tmp_path).active_peft_config.class_names == CLASS_NAMES


def test_what_the_user_says_goes_before_what_the_classifier_has(classifier):
    config = get_peft_model(
        classifier, CLIPPromptTuningConfig(class_names=["cat", "dog"], prompt_template="art of a {}.")
    ).active_peft_config
    assert config.class_names == ["cat", "dog"]
    assert config.prompt_template == "art of a {}."


def test_one_configuration_serves_two_models_one_after_the_other(clip, classifier):
    config = CLIPPromptTuningConfig(num_virtual_tokens=3)
    first = get_peft_model(classifier, config)
    second = get_peft_model(clip, config)
    assert first.active_peft_config.class_names == CLASS_NAMES
    assert second.active_peft_config.class_names is None  # a plain CLIPModel has no classes
    assert first.active_peft_config.num_virtual_tokens == second.active_peft_config.num_virtual_tokens == 3


def test_classes_set_on_one_model_do_not_reach_another_one_of_the_same_configuration(classifier):
    config = CLIPPromptTuningConfig()
    first = get_peft_model(classifier, config)
    other = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "dog"])
    second = get_peft_model(other, config)
    second.base_model.model.set_class_names(["sun", "moon", "star"])
    assert first.active_peft_config.class_names == CLASS_NAMES
    assert second.active_peft_config.class_names == ["sun", "moon", "star"]


def test_a_field_changed_between_two_models_keeps_its_new_value(clip):
    config = CLIPPromptTuningConfig()
    get_peft_model(clip, config)
    config.num_virtual_tokens = 2  # was filled in as 4
    second = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config)
    assert second.active_peft_config.replaced_token_ids == IDS_OF_A_PHOTO_OF_A[:2]


def test_every_field_comes_back_from_a_file(clip, tmp_path):
    config = CLIPPromptTuningConfig(
        prompt_tuning_init="RANDOM", num_virtual_tokens=5, start_idx=2, class_names=["cat", "dog"]
    )
    model = get_peft_model(clip, config)
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CLIPPromptTuningConfig)
    saved = model.active_peft_config.to_dict() | {"inference_mode": True}
    assert loaded.to_dict() == saved


def test_the_file_is_plain_json(clip, tmp_path):
    get_peft_model(clip, CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "CLIP_PROMPT_TUNING"
    assert fields["task_type"] == "PROMPT_CLASSIFICATION"
    assert fields["prompt_tuning_init"] == "TEXT"
    assert fields["replaced_token_ids"] == IDS_OF_A_PHOTO_OF_A


@pytest.fixture
def base_without_tokenizer(tmp_path):
    base = tmp_path / "base_without_tokenizer"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(TINY_CLIP) / name, base)
    return base


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("init", ["TEXT", "RANDOM", "SAMPLE_VOCAB"])
def test_loading_needs_no_tokenizer_and_draws_no_random_number(
    clip, base_without_tokenizer, tmp_path, init, is_trainable, low_cpu_mem_usage
):
    trained = get_peft_model(clip, CLIPPromptTuningConfig(prompt_tuning_init=init))
    trained.save_pretrained(tmp_path / "adapter")
    base = CLIPModel.from_pretrained(base_without_tokenizer)
    state = torch.get_rng_state()
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(torch.get_rng_state(), state)
    (loaded,) = [value for name, value in model.named_parameters() if "learnable_embeddings" in name]
    (saved,) = [value for name, value in trained.named_parameters() if "learnable_embeddings" in name]
    assert torch.equal(loaded, saved)
    assert loaded.requires_grad == is_trainable


@pytest.mark.parametrize("is_trainable", [False, True])
def test_transformers_own_loading_needs_no_tokenizer_either(clip, base_without_tokenizer, tmp_path, is_trainable):
    get_peft_model(clip, CLIPPromptTuningConfig(prompt_tuning_init="RANDOM")).save_pretrained(tmp_path / "adapter")
    model = CLIPModel.from_pretrained(base_without_tokenizer)
    state = torch.get_rng_state()
    model.load_adapter(tmp_path / "adapter", is_trainable=is_trainable)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_adapter_without_a_tokenizer_says_where_to_name_one():
    model = CLIPModel(CLIPModel.config_class.from_pretrained(TINY_CLIP))  # made in memory: no name_or_path
    with pytest.raises(ValueError, match="no name_or_path to load it from; set tokenizer_name_or_path"):
        get_peft_model(model, CLIPPromptTuningConfig())
    named = CLIPPromptTuningConfig(tokenizer_name_or_path=TINY_CLIP)
    assert get_peft_model(model, named).active_peft_config.replaced_token_ids == IDS_OF_A_PHOTO_OF_A


def test_a_saved_configuration_does_not_start_a_new_adapter_in_silence(clip, tmp_path, tokenizer):
    get_peft_model(clip, CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config)
    with pytest.raises(ValueError, match="belongs to saved weights, but none were loaded"):
        model.get_text_features(**tokenizer(["a photo of a cat."], return_tensors="pt"))


def test_the_configuration_of_an_adapter_starts_another_one(classifier):
    model = get_peft_model(classifier, CLIPPromptTuningConfig(prompt_tuning_init_text="art of"))
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    layer = classifier.text_model.embeddings
    assert torch.equal(layer.learnable_embeddings["second"], layer.learnable_embeddings["default"])
    assert classifier.get_class_embeds().isfinite().all()
    assert model.peft_config["second"] is not model.peft_config["default"]


def test_injecting_does_not_change_the_users_configuration(classifier):
    config = CLIPPromptTuningConfig()
    before = config.to_dict()
    get_peft_model(classifier, config)
    after = config.to_dict()
    assert {name for name in before if before[name] != after[name]} == {"base_model_name_or_path"}  # peft's own
