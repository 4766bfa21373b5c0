"""Models whose weights accelerate keeps on the CPU or on disk between calls give the same results."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from adapters import as_if_trained
from cases import new_classifier
from peft import PeftModel, get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
KINDS = {
    "text": {},
    "class_specific": {"class_specific": True},
    "meta_net": {"image_conditioned": True},
    "coupled": {**DEEP, "vision_prompts_from_text": True},
    "kgcoop": {"regularizer": "kgcoop"},
}
LABELS = torch.tensor([0, 1])


def to_disk(model, folder):
    parts = {name: "cpu" for name, _ in model.named_children()} | {"logit_scale": "cpu"}
    parts |= {"text_model": "disk", "text_projection": "disk"}
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatch_model": to_disk,
}


@pytest.fixture(params=WAYS)
def offload(request, tmp_path):
    return lambda model: WAYS[request.param](model, tmp_path / "weights")


def images_for(model):
    size = model.config.vision_config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def tuned_classifier(kind):
    return as_if_trained(get_peft_model(new_classifier(), CLIPPromptTuningConfig(**KINDS[kind])).eval())


def gradients(model, images):
    model.train()(pixel_values=images, labels=LABELS).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@torch.no_grad()
def test_a_classifier_without_an_adapter_is_offloaded(offload):
    model = new_classifier().eval()
    images, embeds = images_for(model), torch.randn(len(model.class_names), model.embed_width)
    expected = model(pixel_values=images).logits
    model.set_class_embeds(embeds)
    of_embeds = model(pixel_values=images).logits
    model = new_classifier().eval()
    offload(model)
    assert model.text_model.device.type == "meta"  # there is something to load
    torch.testing.assert_close(model(pixel_values=images).logits, expected)
    assert model.get_class_embeds().device == torch.device("cpu")
    model.set_class_embeds(embeds)
    torch.testing.assert_close(model(pixel_values=images).logits, of_embeds)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_offloaded_with_its_adapter(kind, offload):
    model = tuned_classifier(kind)
    images = images_for(model)
    expected = model(pixel_values=images).logits
    offload(model.get_base_model())
    torch.testing.assert_close(model(pixel_values=images).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_into_an_offloaded_classifier_and_trained(kind, offload, tmp_path):
    trained = tuned_classifier(kind)
    images = images_for(trained)
    trained.save_pretrained(tmp_path / "adapter")
    base = new_classifier().eval()
    offload(base)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images).logits, trained(pixel_values=images).logits)
    torch.testing.assert_close(gradients(model, images), gradients(trained, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_in_an_offloaded_classifier_starts_as_in_another(kind, offload):
    expected = get_peft_model(new_classifier(), CLIPPromptTuningConfig(**KINDS[kind]))
    base = new_classifier().eval()
    offload(base)
    model = get_peft_model(base, CLIPPromptTuningConfig(**KINDS[kind]))
    vectors = {name: tensor for name, tensor in model.named_parameters() if ".learnable_embeddings." in name}
    assert vectors and all(tensor.device.type == "cpu" for tensor in vectors.values())
    for name, tensor in vectors.items():
        torch.testing.assert_close(tensor, expected.get_parameter(name))


def test_an_offloaded_position_table_is_not_merged_into(offload):
    model = tuned_classifier("text")
    offload(model.get_base_model())
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        model.merge_adapter()
