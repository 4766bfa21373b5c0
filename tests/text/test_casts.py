"""Under autocast, frozen weights are cast once for all chunks of classes, and nothing else changes."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from adapters import as_if_trained, base_of, prompted
from cases import new_classifier
from class_embeds import embeds_and_gradients
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_prompt_peft.data import cache_image_embeds
from clip_prompt_peft.text.casts import keep_casts


NAMES = [f"{word} {number}" for word in ("cat", "golden retriever") for number in range(3)]


def with_prompts(**fields):
    return as_if_trained(prompted(new_classifier(NAMES), **fields))


def with_lora(**fields):
    model = get_peft_model(new_classifier(NAMES), LoraConfig(target_modules=r"text_model.*(q_proj|fc1)", **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def with_a_trained_bias():
    classifier = new_classifier(NAMES).requires_grad_(False)
    for layer in classifier.text_model.encoder.layers:
        layer.mlp.fc1.bias.requires_grad_(True)
    return classifier


def with_tied_weights():
    model = with_prompts()
    first, second = base_of(model).text_model.encoder.layers[:2]
    second.mlp.fc1.weight = first.mlp.fc1.weight
    return model


def with_checkpointing():
    model = with_lora().train()
    model.gradient_checkpointing_enable()
    return model


MODELS = {
    "prompts": with_prompts,
    "prompts of each class": partial(with_prompts, class_specific=True),
    "prompts of each class in a deeper layer": partial(with_prompts, class_aware_layer=1),
    "prompts of each image": partial(with_prompts, image_conditioned=True),
    "lora": with_lora,
    "dora": partial(with_lora, use_dora=True),
    "trained biases": with_a_trained_bias,
    "tied weights": with_tied_weights,
    "gradient checkpointing": with_checkpointing,
}


@contextmanager
def casting_in_every_chunk():
    with mock.patch("clip_prompt_peft.text.encoder.keep_casts", lambda encode, parts: encode):
        yield


class CountCasts(TorchDispatchMode):
    """Counts the casts of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses, self.number = {tensor.data_ptr() for tensor in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.addresses:
            self.number += 1
        return func(*args, **(kwargs or {}))


def step(model, batch_size, path="auto"):
    image_embeds = torch.randn(3, base_of(model).embed_width, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        return embeds_and_gradients(model, image_embeds, path=path, batch_size=batch_size)


def casts_in_a_step(model, batch_size):
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    with CountCasts(frozen) as casts:
        step(model, batch_size)
    return casts.number


# With gradient checkpointing, layers compute again in the backward pass, and cast again.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gradient checkpointing"])
def test_the_number_of_casts_does_not_depend_on_the_number_of_chunks(name):
    model = MODELS[name]()
    at_once = casts_in_a_step(model, None)
    assert casts_in_a_step(model, 3) == casts_in_a_step(model, 1) <= at_once
    with casting_in_every_chunk():
        assert casts_in_a_step(model, 1) > 5 * at_once  # which this test would notice


@pytest.mark.parametrize(("name", "path"), [*((name, "packed") for name in MODELS), ("prompts", "plain")])
def test_embeddings_and_gradients_are_the_same_bit_for_bit(name, path):
    model = MODELS[name]()
    embeds, gradients = step(model, 4, path)
    with casting_in_every_chunk():
        expected, expected_gradients = step(model, 4, path)
    assert torch.equal(embeds, expected)
    assert any(gradient is not None for gradient in gradients)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert gradient is wanted is None or torch.equal(gradient, wanted)


def test_a_step_after_a_change_of_a_weight_uses_the_new_one():
    model = with_prompts()
    before, _ = step(model, 3)
    with torch.no_grad():
        base_of(model).text_projection.weight.neg_()
    after, _ = step(model, 3)
    assert torch.equal(after, -before)


def test_weights_that_hooks_load_for_a_call_are_not_kept():
    model = with_prompts()
    expected = step(model, 2, "plain")
    layer = base_of(model).text_model.encoder.layers[0].mlp.fc1
    weight, kept = layer.weight.detach().clone(), []

    def load(module, inputs):
        module.weight.copy_(weight)

    def unload(module, inputs, output):
        module.weight.zero_()
        kept.append(module)

    with torch.no_grad():
        layer.weight.zero_()
    layer.register_forward_pre_hook(torch.no_grad()(load))
    layer.register_forward_hook(torch.no_grad()(unload))
    embeds, _ = step(model, 2, "plain")
    assert len(kept) > 3
    assert torch.equal(embeds, expected[0])


def test_without_gradients_trained_weights_are_cast_once_too():
    model = new_classifier(NAMES)
    model.class_encoder.batch_size = 1
    with CountCasts(model.parameters()) as casts, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.get_class_embeds()
    assert 0 < casts.number <= len(list(model.text_model.parameters())) + 1


def test_so_are_those_of_the_image_tower_in_all_batches(image_processor):
    images = {"image": [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(6)], "label": [0] * 6}
    features = Features(image=ImageFeature(), label=Value("int64"))
    numbers = []
    for batch_size in (1, 6):
        classifier = new_classifier(NAMES)
        linear = [w for name, w in classifier.vision_model.named_parameters() if "patch_embedding" not in name]
        dataset = Dataset.from_dict(images, features=features)
        with CountCasts(linear) as casts:
            cache_image_embeds(dataset, classifier, image_processor, batch_size, compute_dtype="bfloat16")
        numbers.append(casts.number)
    assert numbers[0] == numbers[1] > 0


class Careful(nn.Module):
    """A layer in low precision and one in full precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, inputs):
        hidden = self.first(inputs)
        with torch.autocast("cpu", enabled=False):
            return self.second(hidden.float()) + self.first(inputs)


def test_parts_that_run_without_autocast_keep_their_weights():
    module, inputs = Careful(), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        encode = keep_casts(module, [module])
        assert torch.equal(encode(inputs), module(inputs))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(encode(inputs), module(inputs))
    assert torch.equal(encode(inputs), module(inputs))


def test_without_autocast_nothing_is_added():
    module = Careful()
    assert keep_casts(module, [module]) is module
