"""Prompts in front of deeper layers, behind the patches of the image, and as maps of each other."""

import copy

import pytest
import torch
from adapters import layer_of, learnable, prompted
from conftest import CLASS_NAMES, TINY_CLIP, needs_compile
from peft import PeftModel, get_peft_model
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


IVLP = {
    "num_virtual_tokens": 3,
    "text_prompt_depth": 2,
    "num_vision_virtual_tokens": 5,
    "vision_prompt_depth": 3,
}
MAPLE = {**IVLP, "num_vision_virtual_tokens": 3, "vision_prompt_depth": 2, "vision_prompts_from_text": True}


def record_inputs(module):
    """The states that a module is called with."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return seen


def test_every_tower_has_prompts_of_its_own_width_up_to_its_depth(clip):
    shapes = {name: tuple(value.shape) for name, value in learnable(prompted(clip, **IVLP)).items()}
    assert shapes == {
        "text_model.embeddings.learnable_embeddings.default": (3, 128),
        "text_model.encoder.layers.1.learnable_prompts.default": (3, 128),
        "vision_model.embeddings.learnable_prompts.default": (5, 160),
        "vision_model.encoder.layers.1.learnable_prompts.default": (5, 160),
        "vision_model.encoder.layers.2.learnable_prompts.default": (5, 160),
    }


def test_deep_text_prompts_replace_the_states_at_the_vectors_positions_and_no_others(clip, tokenizer):
    texts = tokenizer(["a photo of a animal.", "a photo of a red car."], padding=True, return_tensors="pt")
    model = prompted(clip, **IVLP, start_idx=2)
    layers = clip.text_model.encoder.layers
    before, after = record_inputs(layers[1]), record_inputs(layers[1].base_layer)
    model.get_text_features(**texts)
    expected = before[0].clone()
    expected[:, 2:5] = learnable(model)["text_model.encoder.layers.1.learnable_prompts.default"]
    assert torch.equal(after[0], expected)


def test_vision_prompts_stand_behind_the_patches_and_have_no_position(clip, pixel_values):
    plain = clip.vision_model.embeddings(pixel_values)
    model = prompted(clip, **IVLP)
    embeddings = clip.vision_model.embeddings(pixel_values)  # (B, 1 + patches + n, D)
    assert torch.equal(embeddings[:, :-5], plain)
    vectors = learnable(model)["vision_model.embeddings.learnable_prompts.default"]
    assert torch.equal(embeddings[:, -5:], vectors.expand(3, 5, 160))


def test_deep_vision_prompts_replace_the_last_states(clip, pixel_values):
    model = prompted(clip, **IVLP)
    layers = clip.vision_model.encoder.layers
    before, after = record_inputs(layers[2]), record_inputs(layers[2].base_layer)
    last = record_inputs(layers[3])
    model.get_image_features(pixel_values)
    assert torch.equal(after[0][:, :-5], before[0][:, :-5])
    vectors = learnable(model)["vision_model.encoder.layers.2.learnable_prompts.default"]
    assert torch.equal(after[0][:, -5:], vectors.expand(3, 5, 160))
    assert last[0].shape == after[0].shape  # carried on


def test_vision_prompts_go_with_images_of_another_size(clip):
    model = prompted(clip, **IVLP)
    features = model.get_image_features(torch.randn(1, 3, 72, 72), interpolate_pos_encoding=True)
    assert features.last_hidden_state.shape[1] == 1 + 36 + 5


def test_hidden_states_and_attentions_are_returned_as_ever(clip, pixel_values, tokenizer):
    model = prompted(clip, **IVLP)
    texts = tokenizer(["a photo of a animal."], return_tensors="pt")
    text = model.get_text_features(**texts, output_hidden_states=True)
    image = model.get_image_features(pixel_values, output_hidden_states=True)
    assert len(text.hidden_states) == 3 + 1 and len(image.hidden_states) == 4 + 1
    assert torch.equal(image.hidden_states[-1], image.last_hidden_state)


def loss_of(model, pixel_values, labels):
    return model(pixel_values=pixel_values, labels=labels).loss


def gradients(model, pixel_values, labels):
    model.zero_grad()
    loss_of(model, pixel_values, labels).backward()
    return {name: value.grad.clone() for name, value in learnable(model).items()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", [IVLP, MAPLE], ids=["ivlp", "maple"])
def test_gradient_checkpointing_gives_the_same_gradients(classifier, pixel_values, labels, fields, use_reentrant):
    model = prompted(classifier, **fields).train()
    expected = gradients(model, pixel_values, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(model, pixel_values, labels), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_compile
def test_towers_compile(clip, pixel_values, tokenizer):
    model = prompted(clip, **MAPLE)
    texts = tokenizer(["a photo of a animal."], return_tensors="pt")
    expected = model(**texts, pixel_values=pixel_values).logits_per_image
    clip.text_model.encoder.compile(backend="eager", fullgraph=True)
    clip.vision_model.embeddings.compile(backend="eager", fullgraph=True)
    clip.vision_model.encoder.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**texts, pixel_values=pixel_values).logits_per_image, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_stay_in_float32_in_a_model_of_half_precision(pixel_values, labels, dtype):
    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES, dtype=dtype)
    model = prompted(base, **MAPLE, image_conditioned=True).train()
    assert {value.dtype for value in learnable(model).values()} == {torch.float32}
    loss_of(model, pixel_values.to(dtype), labels).backward()
    assert all(torch.isfinite(value.grad).all() for value in learnable(model).values())


# Coupling


def test_coupled_vision_prompts_are_maps_of_the_text_prompts_of_their_depth(clip, pixel_values):
    model = prompted(clip, **MAPLE)
    tensors = learnable(model)
    first = record_inputs(clip.vision_model.encoder.layers[1].base_layer)
    embeddings = clip.vision_model.embeddings(pixel_values)
    model.get_image_features(pixel_values)
    for found, tower, text in [
        (embeddings[:, -3:], "vision_model.embeddings", "text_model.embeddings.learnable_embeddings"),
        (first[0][:, -3:], "vision_model.encoder.layers.1", "text_model.encoder.layers.1.learnable_prompts"),
    ]:
        weight, bias = (tensors[f"{tower}.learnable_projections.default.{name}"] for name in ("weight", "bias"))
        expected = torch.nn.functional.linear(tensors[f"{text}.default"], weight, bias)  # (n, D)
        torch.testing.assert_close(found, expected.expand_as(found))


def test_an_image_alone_gives_its_gradient_to_the_text_prompts(clip, pixel_values):
    model = prompted(clip, **MAPLE).train()
    model.get_image_features(pixel_values).pooler_output.sum().backward()
    gradient = learnable(model)["text_model.encoder.layers.1.learnable_prompts.default"].grad
    assert gradient.abs().max() > 0


def test_maps_of_the_deeper_layers_start_as_one_and_the_first_differs(clip):
    model = prompted(clip, **{**MAPLE, "text_prompt_depth": 3, "vision_prompt_depth": 3})
    maps = [value for name, value in learnable(model).items() if name.endswith("learnable_projections.default.weight")]
    assert torch.equal(maps[1], maps[2]) and not torch.equal(maps[0], maps[1])


def test_a_copy_of_a_model_maps_its_own_text_prompts(clip, pixel_values):
    model = prompted(clip, **MAPLE)
    other = copy.deepcopy(model)
    expected = model.get_image_features(pixel_values).pooler_output
    with torch.no_grad():
        layer_of(other).learnable_embeddings["default"].add_(1.0)
    assert torch.equal(model.get_image_features(pixel_values).pooler_output, expected)
    assert not torch.allclose(other.get_image_features(pixel_values).pooler_output, expected, atol=1e-3)


def test_more_than_one_active_adapter_with_vision_prompts_is_refused(clip, pixel_values):
    model = prompted(clip, **IVLP)
    model.add_adapter("second", CLIPPromptTuningConfig(**IVLP))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="all have vision prompts, whose places .* activate one of them only"):
        model.get_image_features(pixel_values)


# Other models than the one that it was trained in


@pytest.mark.parametrize("model_class", [CLIPTextModelWithProjection, CLIPTextModel])
def test_deep_text_prompts_load_into_a_text_model_and_back(clip, tokenizer, tmp_path, model_class):
    texts = tokenizer(["a photo of a animal.", "a photo of a red car."], padding=True, return_tensors="pt")
    fields = {"num_virtual_tokens": 3, "text_prompt_depth": 3}
    model = prompted(clip, **fields)
    expected = clip.text_model(**texts).last_hidden_state
    model.save_pretrained(tmp_path / "clip")
    text_model = PeftModel.from_pretrained(model_class.from_pretrained(TINY_CLIP), tmp_path / "clip").eval()
    assert torch.equal(text_model(**texts).last_hidden_state, expected)
    text_model.save_pretrained(tmp_path / "text")
    again = PeftModel.from_pretrained(CLIPModel.from_pretrained(TINY_CLIP), tmp_path / "text").eval()
    assert torch.equal(again.get_base_model().text_model(**texts).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            IVLP,
            r"vision prompts \(num_vision_virtual_tokens=5\), which need an image tower, and CLIPTextModel has none",
        ),
        (
            {"image_conditioned": True},
            "image_conditioned needs image embeddings, and CLIPTextModel has no image tower",
        ),
    ],
)
def test_what_needs_an_image_tower_does_not_load_into_a_text_model(clip, tmp_path, fields, message):
    prompted(clip, **fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(CLIPTextModel.from_pretrained(TINY_CLIP), tmp_path)


def test_a_class_aware_layer_that_is_not_there_is_refused_with_the_last_one(clip):
    with pytest.raises(ValueError, match=r"class_aware_layer=3 is not there: .* index 2; take an index from 1 to 2"):
        prompted(clip, class_aware_layer=3)


def test_deep_prompts_in_every_layer_leave_no_room_for_class_aware_ones(clip):
    with pytest.raises(ValueError, match=r"text_prompt_depth=3 \(layers 0 ... 2\) would overwrite"):
        prompted(clip, class_aware_layer=1, text_prompt_depth=None)


def test_class_aware_vectors_need_to_know_the_width_of_class_embeddings():
    model = CLIPTextModel.from_pretrained(TINY_CLIP)
    model.config.projection_dim = None
    with pytest.raises(ValueError, match="class_aware_layer needs to know the width of image and class embeddings"):
        prompted(model, class_aware_layer=1)


@pytest.mark.parametrize("preset", ["cocoop", "maple", "tcp"])
def test_with_low_memory_use_a_new_adapter_is_on_the_meta_device(classifier, preset):
    config = CLIPPromptTuningConfig.from_preset(preset, model=classifier)
    model = get_peft_model(classifier, config, low_cpu_mem_usage=True)
    assert all(value.is_meta for name, value in model.named_parameters() if "learnable_" in name)
