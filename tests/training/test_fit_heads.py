"""Training of class heads with the stock Trainer: what they read off the images, and two stages in one run."""

import math
import os
import subprocess
import sys

import pytest
import torch
import two_stage_processes
from cases import new_classifier
from conftest import CLASS_NAMES, slow_param
from datasets import Dataset
from families import FAMILIES
from launching import torchrun
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    ClassHeadConfig,
    TwoStageTuning,
    fit_class_head,
    method_config,
    training_recipe,
)
from clip_prompt_peft.class_head.resolve import start_of
from clip_prompt_peft.towers import block_layer_norms


NUM_STEPS, NUM_FIRST = 10, 6


def examples(number=12):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(number, 3, 48, 48, generator=generator)
    labels = torch.arange(number) % len(CLASS_NAMES)
    return [{"pixel_values": pixels[i], "labels": labels[i]} for i in range(number)]


def embedded(number=20, views=None):
    generator = torch.Generator().manual_seed(0)
    shape = (number, 128) if views is None else (number, views, 128)
    return {"image_embeds": torch.randn(shape, generator=generator), "labels": torch.arange(number) % 4}


def new_model(name, **fields):
    base = new_classifier()
    return get_peft_model(base, method_config(name, base, **fields))


def tensors_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "ln_tuning" in name}


def trainer_of(model, folder, name="2sfs", dataset=None, **arguments):
    settings = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "seed": 3}
    dataset = examples() if dataset is None else dataset
    recipe = training_recipe(name, model, len(dataset), shots=1, use_cpu=True, **arguments)
    args = TrainingArguments(str(folder), **{**settings, **recipe.arguments})
    return recipe.trainer_class(
        model, args, train_dataset=dataset, optimizers=recipe.optimizers, callbacks=recipe.callbacks
    )


def two_stages(folder, **arguments):
    settings = {"max_steps": NUM_STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **arguments}
    return trainer_of(new_model("2sfs"), folder, **settings)


# Two stages


def test_the_recipe_has_the_steps_and_the_schedules_of_the_paper(tmp_path):
    model = new_model("2sfs")
    recipe = training_recipe("2sfs", model, num_examples=64, shots=16, use_cpu=True)
    assert recipe.arguments["max_steps"] == 4800 and recipe.arguments["per_device_train_batch_size"] == 32
    assert recipe.trainer_class is Trainer
    (callback,) = recipe.callbacks
    assert callback.num_first_steps == 2880
    optimizer, scheduler = recipe.optimizers
    layer_norms, head = optimizer.param_groups
    assert len(head["params"]) == 1 and sum(value.numel() for value in layer_norms["params"]) == 4096
    for group in optimizer.param_groups:
        assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (2e-4, 1e-2, (0.9, 0.999))
    rates = []
    for _ in range(4800):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    rates = torch.tensor(rates)
    for stage, (first, number) in enumerate([(0, 2880), (2880, 1920)]):
        alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
        schedule, expected = torch.optim.lr_scheduler.CosineAnnealingLR(alone, number, eta_min=1e-6), []
        for _ in range(number):
            expected.append(schedule.get_last_lr()[0])
            alone.step()
            schedule.step()
        torch.testing.assert_close(rates[first : first + number, stage], torch.tensor(expected), rtol=1e-4, atol=0)
        outside = torch.cat([rates[:first, stage], rates[first + number :, stage]])
        assert not outside.any()


def test_each_stage_trains_its_part_alone(tmp_path):
    trainer = two_stages(tmp_path)
    model, states = trainer.model, []

    class Watch(TwoStageTuning):
        def __init__(self):
            pass

        def on_train_begin(self, *args, **kwargs):
            states.append(tensors_of(model))

        on_step_end = on_train_begin

    trainer.add_callback(Watch())
    trainer.train()
    assert len(states) == NUM_STEPS + 1

    def moved(step):
        before, after = states[step - 1], states[step]
        return {name for name in after if not torch.equal(after[name], before[name])}

    head = {name for name in states[0] if "ln_tuning_head" in name}
    layer_norms = states[0].keys() - head
    for step in range(1, NUM_FIRST):
        assert moved(step) == layer_norms
    assert moved(NUM_FIRST) == layer_norms | head  # its start
    for step in range(NUM_FIRST + 1, NUM_STEPS + 1):
        assert moved(step) == head
    assert not model.active_peft_config.starts_later


def test_the_head_starts_where_the_text_tower_is(tmp_path):
    trainer = two_stages(tmp_path, max_steps=2)
    trainer.train()  # one step each
    model = trainer.model.eval()
    with torch.no_grad():
        start = start_of(model.active_peft_config, model.get_base_model())
    rows = model.get_base_model().class_head.ln_tuning_head["default"].class_embeds
    assert 0 < (rows - start).abs().max() < 2e-3  # one step of 1e-3
    torch.testing.assert_close(start.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("stop_at", [slow_param(4), NUM_FIRST, slow_param(8)])
def test_it_is_continued_in_either_stage(stop_at, tmp_path):
    whole = two_stages(tmp_path / "whole")
    whole.train()
    first = two_stages(tmp_path / "part", save_strategy="steps", save_steps=stop_at)
    first.add_callback(StopAt(stop_at))
    first.train()
    again = two_stages(tmp_path / "part", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop_at}"))
    assert again.state.global_step == NUM_STEPS
    expected, found = tensors_of(whole.model), tensors_of(again.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.keys() == expected.keys() and not again.model.active_peft_config.starts_later


class StopAt(TwoStageTuning):
    def __init__(self, step):
        self.step = step

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_checkpoint_of_the_first_stage_answers_with_the_text_tower(tmp_path, pixel_values):
    trainer = two_stages(tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(StopAt(4))
    trainer.train()
    model = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert model.active_peft_config.starts_later
    with torch.no_grad():
        torch.testing.assert_close(
            model(pixel_values=pixel_values).logits, trainer.model.eval()(pixel_values=pixel_values).logits
        )


def test_two_stages_and_what_does_not_go_with_them(tmp_path):
    with pytest.raises(ValueError, match="num_first_steps"):
        TwoStageTuning(0)
    trainer = two_stages(tmp_path)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="excludes load_best_model_at_end"):
        trainer.train()
    with pytest.raises(ValueError, match="trains LayerNorms and a class head"):
        training_recipe("2sfs", new_model("zs-lp"), num_examples=8, use_cpu=True)


# Heads on embeddings


@pytest.mark.parametrize(
    ("name", "steps"),
    [("clap", 300), pytest.param("zs-lp", 300, marks=pytest.mark.slow), ("tip-adapter-f", 20), ("tip-adapter", 0)],
)
def test_heads_train_on_embeddings_with_their_recipe(name, steps, tmp_path):
    model, data = new_model(name), embedded()
    fit_class_head(model, data)
    before = tensors_of(model)
    trainer = trainer_of(model, tmp_path, name, Dataset.from_dict(data).with_format("torch"))
    trainer.train()
    assert trainer.state.global_step == steps
    trained = [key for key, value in tensors_of(model).items() if not torch.equal(value, before[key])]
    assert len(trained) == (steps > 0)
    if name == "clap":
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates[:2] == pytest.approx([1e-5, 0.1]) and rates[-1] < 1e-4
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0
    if name == "tip-adapter-f":
        group = next(group for group in trainer.optimizer.param_groups if group["params"])
        assert (group["eps"], group["weight_decay"], group["initial_lr"]) == (1e-4, 1e-2, 1e-3)
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])


def test_views_count_as_the_authors_count_them():
    data = embedded(8, views=3)
    model = new_model("clap")
    fit_class_head(model, data)
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    flat = {"image_embeds": data["image_embeds"].flatten(0, 1), "labels": data["labels"].repeat_interleave(3)}
    with torch.no_grad():
        probabilities = model.eval()(image_embeds=flat["image_embeds"]).logits.softmax(dim=1)
    for label in range(4):
        rows = flat["labels"] == label
        torch.testing.assert_close(head.pull_weights[label], probabilities[rows, label].mean())
    model = new_model("tip-adapter")
    fit_class_head(model, data)
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    expected = torch.nn.functional.normalize(data["image_embeds"].mean(dim=1), dim=1)
    torch.testing.assert_close(head.keys, expected)
    assert model.active_peft_config.num_keys == 8


def test_clap_holds_rows_of_known_classes_and_needs_its_weights():
    model, data = new_model("clap"), embedded()
    with pytest.raises(ValueError, match=r"weights of the pull.*fit_class_head"):
        model.train()(**data)
    fit_class_head(model, data)
    out = model(**data, return_loss_terms=True)
    assert out.loss_terms["pull"] == 0
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    head.class_embeds.data += 1
    out = model(**data, return_loss_terms=True)
    expected = (head.pull_weights * 128).mean()
    torch.testing.assert_close(out.loss_terms["pull"].detach(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(out.loss, out.loss_terms["cross_entropy"] + out.loss_terms["pull"])
    model.eval()
    assert model(**data).loss == model(**data, return_loss_terms=True).loss_terms["cross_entropy"]


def test_what_was_read_off_the_images_is_replaced():
    model, data = new_model("clap"), embedded()
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    fit_class_head(model, {**data, "labels": data["labels"].flip(0)})
    wrong = head.pull_weights.clone()
    head.class_embeds.data.normal_()  # as if it had been trained
    fit_class_head(model, data)
    right = head.pull_weights.clone()
    fresh = new_model("clap")
    fit_class_head(fresh, data)
    torch.testing.assert_close(right, fresh.get_base_model().class_head.ln_tuning_head["default"].pull_weights)
    assert not torch.allclose(right, wrong)


def test_a_step_that_would_leave_the_pull_out_is_refused():
    model, data = new_model("clap"), embedded()
    fit_class_head(model, data)
    with pytest.raises(ValueError, match=r"\['pull'\].*label_smoothing_factor"):
        model.train()(image_embeds=data["image_embeds"])
    model.eval()(image_embeds=data["image_embeds"])


def with_labels(labels):
    return {**embedded(), "labels": labels}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_labels(torch.zeros(20, dtype=torch.long)), r"none of 3 of its 4 classes: \['plant'"),
        (with_labels(torch.arange(20)), "Label 4 is no index of the 4 classes"),
        (with_labels(torch.zeros(3)), r"labels \(N,\), got \(20, 128\) and \(3,\)"),
        ({"pixel_values": 1, "labels": 2}, r"\['pixel_values', 'labels'\]; make them with cache_image_embeds"),
        ({**embedded(), "image_embeds": torch.zeros(20, 3)}, "have 3 values, but the model's have 128"),
        ({**embedded(), "image_embeds": torch.full((20, 128), torch.nan)}, "NaN or Inf"),
    ],
)
def test_images_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        fit_class_head(new_model("clap"), data)


def test_another_adapter_has_no_head():
    with pytest.raises(TypeError, match="with a class head.*got a PeftModel"):
        fit_class_head(get_peft_model(new_classifier(), LoraConfig(target_modules=["q_proj"])), embedded())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": "mlp"}, "head_type must be 'linear' or 'cache'"),
        ({"head_type": "cache", "pull": True}, "pull=True is about rows that are trained"),
        ({"head_type": "cache", "target_modules": "block-layernorms"}, "target_modules='block-layernorms' is about"),
        ({"alpha": 2.0}, "alpha=2.0 is about the keys of a cache"),
        ({"head_type": "cache", "alpha": -1.0}, "alpha must be a number of at least 0"),
        ({"head_type": "cache", "beta": float("nan")}, "beta must be a number"),
        ({"starts_later": True}, "without target_modules nothing changes"),
        ({"pull": True, "target_modules": "block-layernorms"}, "pull=True holds rows near"),
        ({"exclude_modules": ["x"]}, "leaves out nothing without target_modules"),
        ({"modules_to_save": ["x"]}, "does not do"),
        ({"start_templates": []}, "list of templates"),
        ({"start_templates": ["no slot"]}, "'no slot' holds {} 0 times"),
        ({"pull": "yes"}, "pull must be True or False"),
        ({"problem_type": "multi_label_classification", "pull": True}, "one label of each training image"),
    ],
)
def test_bad_combinations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ClassHeadConfig(**fields)


def test_a_head_that_reads_labels_is_refused_on_a_classifier_of_several():
    base = new_classifier()
    base.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="one label of each"):
        get_peft_model(base, method_config("clap", base))
    model = get_peft_model(base, method_config("zs-lp", base))
    assert model.active_peft_config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norms_of_the_layers_are_found_in_every_family(family):
    paths = block_layer_norms(FAMILIES[family].classifier())
    assert all("layer" in path for path in paths) and not any("embeddings" in path for path in paths)
    assert len({path.partition(".")[0] for path in paths}) == 2
    assert not any(path.rpartition(".")[2].startswith(("post_", "pre_", "final_")) for path in paths)


@pytest.mark.slow
def test_two_processes_train_both_stages_as_one_does(tmp_path):
    command = [sys.executable, "-m", *torchrun(2).split(), two_stage_processes.__file__, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = two_stage_processes.trained(tmp_path / "alone", num_processes=1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)
