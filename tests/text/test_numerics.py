"""Extreme sizes, half precision and order: what must not change the result does not, and nothing overflows."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from adapters import as_if_trained, vectors_of
from cases import new_classifier
from conftest import CLASS_NAMES, slow_param
from datasets import Dataset
from packaging import version
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.metrics import compute_metrics


HALF = [torch.float16, torch.bfloat16]
SAME = {"rtol": 0, "atol": 1e-5}
NUM_POSITIONS = 77
SCORED = ["coop", "coop-csc", "cocoop", "vpt-deep", "ivlp", "maple"]  # the others differ in their loss only
TRAINED = ["coop-csc", "cocoop", "maple", "promptsrc"]  # every kind of layer, and the longest loss


def preset_model(preset, **kwargs):
    classifier = new_classifier(**kwargs)
    return get_peft_model(classifier, CLIPPromptTuningConfig.from_preset(preset, model=classifier)).eval()


def new_model(dtype=torch.float32, class_names=CLASS_NAMES, **fields):
    model = get_peft_model(new_classifier(class_names, dtype), CLIPPromptTuningConfig(**fields)).eval()
    return as_if_trained(model)


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def deviation(tensor, other, record_property, name):
    """Of the largest element, recorded for `--junit-xml`, and printed with `-s`."""
    largest = (tensor.float() - other.float()).abs().max().item()
    record_property(name, largest)
    print(f"\n{name}: {largest:.1e}", end="")
    return largest


# Half precision


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logits_and_gradients_are_finite_at_the_largest_logit_scale_and_for_huge_embeddings(dtype):
    model = new_model(dtype)
    base = model.get_base_model()
    base.logit_scale.data.fill_(math.log(100))
    embeds = torch.randn(4, base.config.projection_dim)
    embeds *= 60_000 / embeds.abs().max()  # their squares are not finite in float16
    out = model(image_embeds=embeds.to(dtype), labels=torch.tensor([0, 1, 2, 3]))
    assert out.logits.dtype == torch.float32
    assert out.logits.abs().max() <= 100 * (1 + 1e-5)
    out.loss.backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tiny_image_embeddings_keep_their_direction(dtype):
    model = new_model()
    embeds = torch.randn(4, model.get_base_model().config.projection_dim)
    expected = model(image_embeds=embeds).logits
    scaled = (embeds * 1e-3 / embeds.abs().max()).to(dtype)  # their squares are nothing in float16
    scale = model.get_base_model().logit_scale.exp().item()
    tolerance = {"rtol": 0, "atol": scale * torch.finfo(dtype).eps}
    torch.testing.assert_close(model(image_embeds=scaled).logits, expected, **tolerance)


@pytest.mark.parametrize("preset", TRAINED)
@pytest.mark.parametrize("dtype", [slow_param(torch.float16), torch.bfloat16], ids=str)
def test_a_scaled_step_over_a_half_precision_base_is_the_unscaled_one(preset, dtype, pixel_values, labels):
    def step(scaler):
        torch.manual_seed(0)
        model = preset_model(preset, dtype=dtype).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        loss = model(pixel_values=pixel_values.to(dtype), labels=labels, return_loss_terms=True).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return trained

    before = [value.detach().clone() for value in step(torch.amp.GradScaler("cpu", enabled=False))]
    scaled = step(torch.amp.GradScaler("cpu", init_scale=2.0**6))
    assert all(value.isfinite().all() for value in scaled)
    tolerance = {"rtol": 0, "atol": 20 * torch.finfo(dtype).eps * 1e-1}
    for value, other in zip(scaled, before):
        torch.testing.assert_close(value, other, **tolerance)


def test_a_step_whose_scaled_gradient_overflows_is_left_out(pixel_values, labels):
    model = new_model(torch.float16).train()
    before = vectors_of(model).detach().clone()
    optimizer = torch.optim.SGD([vectors_of(model)], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scaler.scale(model(pixel_values=pixel_values.half(), labels=labels).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(vectors_of(model), before)
    assert scaler.get_scale() < 2.0**120


# Sizes


@pytest.mark.parametrize("num_virtual_tokens", [1, 73, 74])
def test_any_number_of_vectors_that_fits_is_trained(num_virtual_tokens, pixel_values):
    # begin token, vectors, class name, end token; the template must not have more
    names = ["animal", "plant"]
    model = new_model(class_names=names, num_virtual_tokens=num_virtual_tokens, prompt_template="{}").train()
    loss = model(pixel_values=pixel_values, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    assert vectors_of(model).shape[0] == num_virtual_tokens
    assert vectors_of(model).grad.isfinite().all() and vectors_of(model).grad.any(dim=1).all()


def test_one_vector_too_many_is_refused_by_number():
    with pytest.raises(ValueError, match="take fewer vectors"):
        new_model(num_virtual_tokens=75, prompt_template="{}")


def test_class_names_may_have_one_token_up_to_all_that_fit(tokenizer, pixel_values):
    def name_of(num_tokens):
        name = " ".join(["cat"] * num_tokens)
        assert len(tokenizer(name, add_special_tokens=False)["input_ids"]) == num_tokens
        return name

    longest = NUM_POSITIONS - 2 - len(tokenizer("a photo of a .", add_special_tokens=False)["input_ids"])
    names = [name_of(number) for number in range(1, longest + 1)]
    model = new_model(class_names=names)
    logits = model(pixel_values=pixel_values).logits  # (B, C)
    model.get_base_model().class_encoder.path = "plain"
    torch.testing.assert_close(model(pixel_values=pixel_values).logits, logits, **SAME)
    with pytest.raises(ValueError, match="makes 78 tokens, but the text tower has 77"):
        model.get_base_model().set_class_names([*names, name_of(longest + 1)])


@pytest.mark.parametrize("preset", TRAINED)
def test_one_image_and_one_class_are_enough(preset, pixel_values):
    model = preset_model(preset, class_names=["cat"]).train()
    out = model(pixel_values=pixel_values[:1], labels=torch.tensor([0]), return_loss_terms=True)
    assert out.logits.shape == (1, 1)
    assert out.loss.isfinite()
    out.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# Order


@pytest.mark.parametrize("preset", SCORED)
def test_neither_the_order_of_the_classes_nor_the_split_into_batches_matters(preset, record_property):
    pixel_values = torch.randn(5, 3, 48, 48)
    order = [2, 0, 3, 1]
    model = as_if_trained(preset_model(preset))
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits  # (B, C)
        parts = [model(pixel_values=part).logits for part in pixel_values.split([1, 3, 1])]
        assert deviation(torch.cat(parts), logits, record_property, f"{preset}, split of a batch") < 1e-5
        if model.active_peft_config.class_specific:  # one vector for each class: they move along
            layouts = model.text_model.embeddings.prompt_layouts
            layouts["default"] = replace(layouts["default"], class_names=None)
            vectors_of(model).copy_(vectors_of(model)[order].clone())
        model.get_base_model().set_class_names([CLASS_NAMES[index] for index in order])
        moved = model(pixel_values=pixel_values).logits
        assert deviation(moved, logits[:, order], record_property, f"{preset}, order of classes") < 1e-5


# The Trainer


def rows(num_images):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_images, 3, 48, 48, generator=generator)
    return [{"pixel_values": image, "labels": index % len(CLASS_NAMES)} for index, image in enumerate(images)]


def new_trainer(tmp_path, **kwargs):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, **{**settings, **quiet, **kwargs})
    return Trainer(get_peft_model(new_classifier(), CLIPPromptTuningConfig()), arguments, train_dataset=rows(12))


@pytest.mark.slow
def test_full_determinism_gives_bit_identical_runs(tmp_path):
    def train():
        trainer = new_trainer(tmp_path, full_determinism=True, seed=3)
        trainer.train()
        return vectors_of(trainer.model).detach()

    try:
        assert torch.equal(train(), train())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("preset", TRAINED)
def test_a_preset_runs_in_deterministic_mode_twice_the_same(preset, pixel_values, labels):
    def run():
        set_seed(3, deterministic=True)
        model = preset_model(preset).train()
        model(pixel_values=pixel_values, labels=labels, return_loss_terms=True).loss.backward()
        return gradients(model)

    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="5.18 ends with an error, for any model"
)
@pytest.mark.parametrize("empty", [[], Dataset.from_dict({"pixel_values": [], "labels": []})], ids=["list", "Dataset"])
def test_evaluating_on_an_empty_set_reports_no_loss_as_for_any_model_of_transformers(tmp_path, empty):
    trainer = new_trainer(tmp_path)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate(empty)
    assert metrics["eval_samples_per_second"] == 0
    assert not {"eval_loss", "eval_accuracy"} & metrics.keys()
