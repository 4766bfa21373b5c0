"""Tests of the settings of the papers: what each preset trains."""

import pytest
import torch
from conftest import TINY_CLIP
from peft import get_peft_model
from transformers import CLIPConfig

from clip_prompt_peft import PRESETS, CLIPForPromptClassification, CLIPPromptTuningConfig


# For ViT-B/16, computed from the authors' code. Class-specific presets have 100 classes.
TRAINED_PARAMETERS = {
    "coop": 8_192,
    "coop-csc": 8_192 * 100,
    "cocoop": 35_360,
    "vpt-shallow": 8 * 768,
    "vpt-deep": 73_728,
    "ivlp": 46_080,
    "maple": 3_555_072,
    "kgcoop": 2_048,
    "prograd": 8_192,
    "tcp": 331_904,
    "promptkd": 1_013_760,
    "promptsrc": 46_080,
}


def vit_b_16():
    """A ViT-B/16 CLIP on the meta device, which takes no memory."""
    text = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12, "intermediate_size": 2048}
    vision = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 224}, projection_dim=512)
    with torch.device("meta"):
        return CLIPForPromptClassification(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_trains_as_many_parameters_of_vit_b_16_as_the_authors_code(name):
    class_names = [f"class {i}" for i in range(100)]
    config = CLIPPromptTuningConfig.from_preset(
        name, class_names=class_names, tokenizer_name_or_path=TINY_CLIP, inference_mode=False
    )
    model = get_peft_model(vit_b_16(), config)
    assert model.get_nb_trainable_parameters()[0] == TRAINED_PARAMETERS[name]


def test_the_table_above_has_every_preset():
    assert PRESETS.keys() == TRAINED_PARAMETERS.keys()


def test_an_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(ValueError, match=r"no preset 'coop-op'; there are \['cocoop', 'coop', "):
        CLIPPromptTuningConfig.from_preset("coop-op")


def test_fields_of_a_preset_can_be_overridden():
    config = CLIPPromptTuningConfig.from_preset("coop", num_virtual_tokens=4, class_token_position="front")
    assert (config.num_virtual_tokens, config.class_token_position.value) == (4, "front")
    assert config.prompt_tuning_init.value == "RANDOM"


def test_depths_of_a_preset_are_limited_to_the_layers_of_the_model(clip):
    config = CLIPPromptTuningConfig.from_preset("maple", model=clip)
    # The vision depth is not 4, since each vision prompt is projected from a text prompt.
    assert (config.text_prompt_depth, config.vision_prompt_depth) == (3, 3)
    config = CLIPPromptTuningConfig.from_preset("ivlp", model=clip)
    assert (config.text_prompt_depth, config.vision_prompt_depth) == (3, 4)
    assert CLIPPromptTuningConfig.from_preset("ivlp").vision_prompt_depth == 9
    with pytest.raises(ValueError, match="text_prompt_depth=9 is more than the 3 layers beside 'text_model.embedd"):
        get_peft_model(clip, CLIPPromptTuningConfig.from_preset("ivlp"))


def test_no_depth_means_every_layer(clip):
    model = get_peft_model(clip, CLIPPromptTuningConfig.from_preset("vpt-deep"))
    assert model.active_peft_config.vision_prompt_depth == 4
