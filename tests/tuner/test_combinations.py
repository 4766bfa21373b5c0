"""Choices that do not go together are refused with the reason, before any work."""

import pytest
from conftest import CLASS_NAMES
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


VISION = {"num_vision_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_virtual_tokens": 0},
            r"got 0 \(0, no text vectors, only with num_vision_virtual_tokens or projection_dim\)",
        ),
        ({"num_virtual_tokens": 0, **VISION, "class_specific": True}, "class_specific=True is about text vectors"),
        ({"num_virtual_tokens": 0, **VISION, "image_conditioned": True}, "image_conditioned=True is about text"),
        ({"num_virtual_tokens": 0, **VISION, "text_prompt_depth": 2}, "text_prompt_depth=2 is about text vectors"),
        (
            {"num_virtual_tokens": 0, **VISION, "class_token_position": "front"},
            "class_token_position='front' is about text vectors, but num_virtual_tokens=0",
        ),
        ({"class_specific": True, "image_conditioned": True}, "exclude each other: .* class to class or from image"),
        ({"class_token_position": "middle", "text_prompt_depth": 2}, "text_prompt_depth=2 needs .*'end'"),
        ({"class_specific": True, "text_prompt_depth": 2}, "text_prompt_depth=2 needs .* class_specific=False"),
        ({"num_virtual_tokens": 0, **VISION, "class_aware_layer": 2}, "class_aware_layer=2 is about text vectors"),
        ({"class_aware_layer": 0}, "must be the index of a text layer from 1 on, .* got 0. .* use class_specific"),
        ({"class_aware_layer": True}, "must be the index of a text layer from 1 on, .* got True"),
        ({"class_aware_layer": 2, "class_specific": True}, "class_aware_layer needs .* class_specific=False"),
        ({"class_aware_layer": 2, "image_conditioned": True}, "class_aware_layer needs .* image_conditioned=False"),
        ({"class_aware_layer": 2, "class_token_position": "front"}, "class_aware_layer needs .*='end'"),
        ({"class_aware_layer": 2, "text_prompt_depth": 3}, r"layers 0 ... 2\) would overwrite; .* at most 2"),
        (
            {"class_aware_layer": 2, "teacher_templates": []},
            r"teacher_templates must be a list of templates, got \[\]",
        ),
        ({"class_token_position": "start"}, "must be one of 'end', 'middle', 'front', got 'start'"),
        ({"class_token_count": "both"}, "must be one of 'in_prompt', 'alone', got 'both'"),
        ({"text_prompt_depth": 0}, "text_prompt_depth must be a positive integer, or None for every layer, got 0"),
        ({"vision_prompt_depth": -1, **VISION}, "vision_prompt_depth must be a positive integer, .* got -1"),
        ({"num_vision_virtual_tokens": None}, "num_vision_virtual_tokens must be an integer of at least 0, got None"),
        ({"vision_prompt_depth": 2}, "vision_prompt_depth=2 needs vision prompts; set num_vision_virtual_tokens"),
        ({"vision_prompt_depth": None}, "vision_prompt_depth=None needs vision prompts"),
        ({"vision_prompts_from_text": True}, "vision_prompts_from_text needs vision prompts; set num_vision"),
        (
            {"vision_prompts_from_text": True, "num_virtual_tokens": 2, **VISION},
            "num_vision_virtual_tokens=4 must equal num_virtual_tokens=2",
        ),
        (
            {"vision_prompts_from_text": True, **VISION, "vision_prompt_depth": 3, "text_prompt_depth": 2},
            "vision_prompt_depth=3 goes beyond text_prompt_depth=2; make them equal",
        ),
        (
            {"vision_prompts_from_text": True, **VISION, "class_specific": True},
            "an image has no class yet whose vectors could be mapped",
        ),
        ({"regularizer": "l2"}, r"regularizer must be one of \['kgcoop', 'prograd', 'promptsrc'\] or None, got 'l2'"),
        ({"regularizer": "kgcoop", "regularizer_weights": {"w": 1.0}}, r"may be \['weight'\], got 'w'"),
        ({"regularizer_weights": {"weight": 1.0}}, "regularizer_weights=.* needs a regularizer; name one"),
        ({"teacher_templates": ["a {}."]}, "teacher_templates=.* needs a regularizer; name one"),
        ({"regularizer": "kgcoop", "teacher_templates": "a {}."}, "teacher_templates must be a list of templates"),
        ({"regularizer": "kgcoop", "teacher_templates": ["a cat"]}, "holds {} 0 times"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPPromptTuningConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_prompt_depth": 4}, "text_prompt_depth=4 is more than the 3 layers beside 'text_model.embeddings'"),
        (
            {**VISION, "vision_prompt_depth": 5},
            "vision_prompt_depth=5 is more than the 4 layers beside 'vision_model.embeddings'; .*=None for all",
        ),
        (
            {"vision_prompts_from_text": True, "num_vision_virtual_tokens": 3},
            "num_vision_virtual_tokens=3 must equal the number of text vectors, 4",
        ),
        (
            {"class_token_position": "front", "num_virtual_tokens": 2},
            "in the template 'a photo of a {}.' they end 2 tokens earlier; take more vectors, or",
        ),
        ({**VISION, "target_modules": ["text_model.embeddings"]}, "an image tower, and target_modules names none"),
        ({**VISION, "target_modules": ["vision_model.embeddings"]}, "must name the text embeddings too"),
        (
            {**VISION, "vision_prompts_from_text": True, "exclude_modules": ["text_model.embeddings"]},
            "exclude_modules leaves out 'text_model.embeddings', but with vision_prompts_from_text",
        ),
        ({**VISION, "target_modules": ["encoder"]}, "'text_model.encoder' is a CLIPEncoder and holds no CLIP text"),
    ],
)
def test_a_configuration_that_the_model_cannot_serve_is_refused_before_anything_is_injected(clip, fields, message):
    modules = [type(module) for module in clip.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(clip, CLIPPromptTuningConfig(class_names=CLASS_NAMES, **fields))
    assert [type(module) for module in clip.modules()] == modules


def test_embeddings_can_be_left_out_by_name(clip):
    config = CLIPPromptTuningConfig(**VISION, vision_prompt_depth=2, exclude_modules=["vision_model.embeddings"])
    model = get_peft_model(clip, config)
    names = sorted(name for name, value in model.named_parameters() if value.requires_grad)
    assert [name.removeprefix("base_model.model.") for name in names] == [
        "text_model.embeddings.learnable_embeddings.default",
        "vision_model.encoder.layers.1.learnable_prompts.default",
    ]
