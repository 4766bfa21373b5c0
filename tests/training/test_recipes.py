"""Tests of the training recipes: the settings of the papers and of the default prompts."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import (
    PRESETS,
    CLIPPromptTuningConfig,
    DistillationTrainer,
    GaussianPromptAveraging,
    ProGradTrainer,
    training_recipe,
)
from clip_prompt_peft.training.recipes import SETTINGS, epoch_learning_rate, with_epoch_cosine


def test_every_preset_has_a_recipe():
    assert SETTINGS.keys() == PRESETS.keys()


def test_an_unknown_recipe_is_an_error_that_lists_all():
    with pytest.raises(ValueError, match=r"no recipe 'coop-op'; there are \['default', '2sfs', 'clap', 'clip-lora', "):
        training_recipe("coop-op", torch.nn.Linear(1, 1), num_examples=1)


def test_the_learning_rate_is_the_one_in_the_authors_log():
    # 50 epochs at 0.002; the last two epochs as logged in CoOp's issue 26
    assert epoch_learning_rate(49, 0.002, 50) == pytest.approx(7.885299e-06, rel=1e-6)
    assert epoch_learning_rate(48, 0.002, 50) == pytest.approx(1.771275e-05, rel=1e-6)
    assert epoch_learning_rate(0, 0.002, 50) == 1e-5
    assert epoch_learning_rate(1, 0.002, 50) == 0.002


def test_the_schedule_changes_once_per_epoch_and_starts_with_the_warm_up():
    optimizer, scheduler = with_epoch_cosine(torch.nn.Linear(2, 2), 0.002, num_epochs=3, steps_per_epoch=2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    second, third = 0.002, 0.001 * (1 + math.cos(math.pi / 3))
    assert rates == pytest.approx([1e-5, 1e-5, second, second, third, third])
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["weight_decay"] == 5e-4


@pytest.mark.parametrize(
    ("name", "shots", "epochs", "batch_size", "learning_rate"),
    [
        ("coop", 16, 200, 32, 0.002),
        ("coop", 8, 200, 32, 0.002),
        ("coop", 4, 100, 32, 0.002),
        ("coop", 2, 100, 32, 0.002),
        ("coop", 1, 50, 32, 0.002),
        ("cocoop", 16, 10, 1, 0.002),
        ("maple", 16, 5, 4, 0.0035),
        ("kgcoop", 16, 100, 128, 0.002),
        ("tcp", 16, 50, 32, 0.002),
        ("promptsrc", 16, 20, 4, 0.0025),
    ],
)
def test_a_recipe_has_the_settings_of_the_paper(clip, name, shots, epochs, batch_size, learning_rate):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    recipe = training_recipe(name, model, num_examples=640, shots=shots, use_cpu=True)
    assert recipe.arguments["num_train_epochs"] == epochs
    assert recipe.arguments["per_device_train_batch_size"] == batch_size
    assert recipe.arguments["learning_rate"] == learning_rate
    assert recipe.arguments["max_grad_norm"] == 0.0


@pytest.fixture
def clip_lora(classifier):
    return get_peft_model(classifier, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(("shots", "steps", "epochs"), [(1, 500, 500), (16, 8000, 1000)])
def test_clip_lora_takes_500_steps_for_each_image_of_a_class(clip_lora, shots, steps, epochs):
    recipe = training_recipe("clip-lora", clip_lora, num_examples=16 * shots, shots=shots, use_cpu=True)
    assert (recipe.arguments["max_steps"], recipe.arguments["num_train_epochs"]) == (steps, epochs)
    assert recipe.arguments["per_device_train_batch_size"] == 32


def test_clip_lora_trains_with_adamw_and_the_authors_cosine(clip_lora, tmp_path):
    recipe = training_recipe("clip-lora", clip_lora, num_examples=40, shots=10, max_steps=10, use_cpu=True)
    examples = [{"image_embeds": torch.randn(128), "labels": i % 4} for i in range(40)]
    args = TrainingArguments(
        tmp_path, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **recipe.arguments
    )
    trainer = recipe.trainer_class(clip_lora, args, train_dataset=examples, optimizers=recipe.optimizers)
    trainer.train()
    expected = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-2)
    schedule, rates = torch.optim.lr_scheduler.CosineAnnealingLR(expected, 10, eta_min=1e-6), []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        expected.step()
        schedule.step()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(rates)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW) and trainer.args.max_grad_norm == 0
    (of_all,) = [group for group in trainer.optimizer.param_groups if group["params"]]
    assert len(of_all["params"]) == sum(parameter.requires_grad for parameter in clip_lora.parameters())
    names = ("betas", "eps", "weight_decay")
    assert {name: of_all[name] for name in names} == {name: expected.defaults[name] for name in names}


def test_arguments_of_the_user_replace_those_of_clip_lora(clip_lora):
    given = {"num_train_epochs": 3, "lr_scheduler_type": "linear", "weight_decay": 0.0, "use_cpu": True}
    arguments = training_recipe("clip-lora", clip_lora, num_examples=40, **given).arguments
    assert arguments.items() >= given.items() and not {"max_steps", "lr_scheduler_kwargs"} & arguments.keys()


@pytest.mark.parametrize(
    ("num_examples", "shots", "epochs"),
    [
        (12, 1, 50),  # one step an epoch
        (5, 3, 100),  # two classes, five images in all
        (48, 4, 50),
        (192, 16, 100),  # 6 steps an epoch
        (16_000, 16, 10),  # of 500 steps
    ],
)
def test_the_default_recipe_takes_50_to_600_steps_but_at_least_ten_epochs(clip, num_examples, shots, epochs):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    recipe = training_recipe("default", model, num_examples, shots, use_cpu=True)
    assert recipe.arguments["num_train_epochs"] == epochs
    assert recipe.arguments["learning_rate"] == (5e-4 if shots == 1 else 1e-3 if shots <= 4 else 2e-3)
    assert recipe.optimizers == (None, None) and recipe.trainer_class is Trainer


def test_arguments_of_the_user_replace_those_of_the_default_recipe(clip):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    given = {"per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "use_cpu": True}
    recipe = training_recipe("default", model, num_examples=48, shots=4, **given)
    assert recipe.arguments["num_train_epochs"] == 17  # 6 steps an epoch
    assert recipe.arguments.items() >= given.items()


@pytest.mark.parametrize("numbers", [{"num_examples": 0}, {"num_examples": 8, "shots": 0}])
def test_a_recipe_for_no_images_is_an_error(clip, numbers):
    with pytest.raises(ValueError, match="num_examples and shots must be 1 or more, got "):
        training_recipe("default", get_peft_model(clip, CLIPPromptTuningConfig()), **numbers)


def test_recipes_have_the_trainer_class_and_callbacks_of_their_method(clip):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    recipes = {name: training_recipe(name, model, num_examples=64, use_cpu=True) for name in PRESETS}
    assert {name for name in PRESETS if recipes[name].trainer_class is not Trainer} == {"prograd", "promptkd"}
    assert recipes["promptkd"].trainer_class is DistillationTrainer
    assert recipes["prograd"].trainer_class is ProGradTrainer
    (averaging,) = recipes["promptsrc"].callbacks
    assert isinstance(averaging, GaussianPromptAveraging) and (averaging.mean, averaging.std) == (15, 1)
    assert all(not recipes[name].callbacks for name in PRESETS if name != "promptsrc")


def test_tcp_trains_with_adam_and_a_large_eps(clip):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    optimizer, _ = training_recipe("tcp", model, num_examples=64, use_cpu=True).optimizers
    assert type(optimizer) is torch.optim.Adam
    assert {name: optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")} == {
        "betas": (0.9, 0.999),
        "eps": 1e-3,
        "weight_decay": 5e-4,
    }


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ("maple", {}, "configuration has num_vision_virtual_tokens=0. Make .*method_config\\('maple', model\\)"),
        ("coop", {"regularizer": "kgcoop"}, "configuration has regularizer='kgcoop'"),
        ("tcp", {"regularizer": "kgcoop"}, "configuration has class_aware_layer=None"),
        ("clip-lora", {}, "configuration learns vectors"),
    ],
)
def test_prompts_of_another_kind_than_the_recipe_is_for_are_told(clip, recipe, fields, message):
    model = get_peft_model(clip, CLIPPromptTuningConfig(**fields))
    with pytest.warns(UserWarning, match=message):
        training_recipe(recipe, model, num_examples=64)


@pytest.mark.parametrize("name", ["default", *sorted(PRESETS)])
def test_prompts_of_the_recipes_own_kind_are_not_told(classifier, name, recwarn):
    fields = {"prompt_template": "a photo of a {}."}
    config = (
        CLIPPromptTuningConfig(**fields) if name == "default" else CLIPPromptTuningConfig.from_preset(name, classifier)
    )
    training_recipe(name, get_peft_model(classifier, config), num_examples=64)
    assert not [warning for warning in recwarn if "recipe" in str(warning.message)]


@pytest.mark.parametrize("name", ["default", "coop", "clip-lora"])
@pytest.mark.parametrize(
    ("has_accelerator", "given", "expected"),
    [
        (False, {}, False),
        (False, {"dataloader_pin_memory": True}, True),
        (True, {"use_cpu": True}, False),
        (True, {}, None),
    ],
)
def test_memory_is_pinned_for_an_accelerator_only(clip, monkeypatch, name, has_accelerator, given, expected):
    """torch warns of it in every data loader otherwise."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    recipe = training_recipe(name, model, num_examples=64, **given)
    assert recipe.arguments.get("dataloader_pin_memory") is expected


def test_batches_are_divided_among_processes(clip, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    recipe = training_recipe("coop", model, num_examples=64)
    assert recipe.arguments["per_device_train_batch_size"] == 8


@pytest.mark.parametrize(("num_examples", "steps"), [(10, 2), (3, 1)])
def test_the_trainer_takes_as_many_steps_as_the_schedule_expects(classifier, tmp_path, num_examples, steps):
    """The last incomplete batch is dropped unless it is the only one, so the second epoch has the full rate."""
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    recipe = training_recipe("maple", model, num_examples, num_train_epochs=2, use_cpu=True, report_to="none")
    examples = [{"image_embeds": torch.randn(128), "labels": i % 4} for i in range(num_examples)]
    args = TrainingArguments(tmp_path, logging_steps=1, save_strategy="no", disable_tqdm=True, **recipe.arguments)
    trainer = recipe.trainer_class(model, args, train_dataset=examples, optimizers=recipe.optimizers)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-5] * steps + [0.0035] * steps)


def test_a_model_without_trainable_parameters_is_an_error(clip):
    clip.requires_grad_(False)
    for name in ("coop", "clip-lora"):
        with pytest.raises(ValueError, match="nothing to train; put an adapter into it first"):
            training_recipe(name, clip, num_examples=8, use_cpu=True)
