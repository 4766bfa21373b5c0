#!/usr/bin/env python
r"""Trains every published method with its authors' recipe, and prints one table of what came out.

Without arguments on the pictures that come with the examples, with three seeds, which takes some minutes on a CPU.
The arguments are those of run_prompt_tuning.py, and all that is given holds for every method:

    python compare_methods.py
    python compare_methods.py --method maple
    python compare_methods.py --train_dir pets/train --test_dir pets/test --num_seeds 3
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from clip_prompt_peft import PRESETS
from clip_prompt_peft.commands.arguments import PromptArguments, parse_arguments, plan_runs, use_one_thread_if_tiny
from clip_prompt_peft.commands.train import Results, draw, evaluate, load_data, load_model, set_up_logging, tune
from clip_prompt_peft.data import cache_image_embeds, class_names_of, with_pixel_values
from clip_prompt_peft.training.recipes import Recipe


# As CLIP-LoRA (MaxZanella/CLIP-LoRA) sets it: rank 2 on query, key and value of both towers, AdamW with 2e-4. As many
# epochs as CoOp, for the same number of images seen.
LORA = LoraConfig(r=2, lora_alpha=1, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"])
LORA_ARGUMENTS = {"learning_rate": 2e-4, "num_train_epochs": 200, "per_device_train_batch_size": 32}
METRICS = ("accuracy", "mean_class_accuracy")


@dataclass
class Outcome:
    """Of one method and one seed."""

    results: Results
    num_trainable: int
    num_bytes: int
    seconds_per_epoch: float


def main() -> None:
    model_args, data_args, prompt_args, training_args = parse_arguments()
    set_up_logging(training_args)
    training_args.disable_tqdm, training_args.logging_strategy = True, "no"
    use_one_thread_if_tiny(model_args.model_name_or_path)
    splits, test_sets = load_data(data_args, model_args, training_args)
    model, image_processor = load_model(model_args, prompt_args, class_names_of(splits["train"]))
    test_sets = {name: with_pixel_values(dataset, image_processor) for name, dataset in test_sets.items()}
    rows = [["method", *columns(test_sets), "trained", "adapter", "s / epoch"]]
    rows.append(["zero-shot", *cells([evaluate(model, test_sets, training_args)]), "0", "-", "-"])
    print_row(rows[0])
    print_row(["---"] * len(rows[0]))
    print_row(rows[1])
    for method in [prompt_args.method] if prompt_args.method else ("lora", *PRESETS):
        outcomes = []
        for run_args in plan_runs(model_args, data_args, training_args):
            run_args = replace(run_args, output_dir=os.path.join(run_args.output_dir, method))
            train_images, _ = draw(splits, data_args, run_args)
            set_seed(run_args.seed)
            prompt_args = replace(prompt_args, method=None if method == "lora" else method)
            config = LORA if method == "lora" else prompt_args.config(model)
            if data_args.augment or getattr(config, "num_vision_virtual_tokens", 1):
                train_set = with_pixel_values(train_images, image_processor, augment=data_args.augment)
            else:  # the image tower stays as it is
                train_set = cache_image_embeds(train_images, model, image_processor)
            adapted = get_peft_model(model, config)
            outcomes.append(try_out(adapted, prompt_args, run_args, train_set, data_args.shots, test_sets))
            model = adapted.unload()
        print_row([method, *cells([outcome.results for outcome in outcomes]), *costs(outcomes)])


def try_out(model, prompt_args: PromptArguments, run_args: TrainingArguments, train_set, shots, test_sets) -> Outcome:
    recipe = prompt_args.recipe(model, run_args, len(train_set), shots)
    if prompt_args.method is None:
        recipe = Recipe(LORA_ARGUMENTS, (None, None))
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's logs, apart from the table
        trainer = tune(model, recipe, run_args, train_set, None, None)
    model.save_pretrained(run_args.output_dir)
    (runtime,) = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return Outcome(
        results=evaluate(model, test_sets, run_args),
        num_trainable=model.get_nb_trainable_parameters()[0],
        num_bytes=os.path.getsize(os.path.join(run_args.output_dir, "adapter_model.safetensors")),
        seconds_per_epoch=runtime / trainer.args.num_train_epochs,
    )


def columns(test_sets) -> list[str]:
    own, *others = test_sets
    names = [f"{own}, accuracy", f"{own}, class mean"]
    return names + [f"{', '.join(others)}, class mean"] * bool(others)


def cells(runs: list[Results]) -> list[str]:
    """Mean and standard deviation over runs: accuracy and class mean of the first test set, class mean of the rest."""
    own, *others = runs[0]
    values = [[run[own][metric] for run in runs] for metric in METRICS]
    if others:
        values.append([np.mean([run[name]["mean_class_accuracy"] for name in others]) for run in runs])
    values = [100 * np.asarray(value) for value in values]
    return [f"{value.mean():.1f}" + (f" ± {value.std():.1f}" if len(runs) > 1 else "") for value in values]


def costs(outcomes: list[Outcome]) -> list[str]:
    seconds = np.mean([outcome.seconds_per_epoch for outcome in outcomes])
    return [f"{outcomes[0].num_trainable:,}", f"{outcomes[0].num_bytes / 1024:.1f} KB", f"{seconds:.2f}"]


def print_row(row: list[str]) -> None:
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
