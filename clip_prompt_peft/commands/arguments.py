"""The arguments of the command `train`, on the command line or in a file."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from peft import PeftConfig
from transformers import CLIPModel, TrainingArguments

from .. import PRESETS, CLIPPromptTuningConfig, method_config, training_recipe
from ..assets import TINY_CLIP
from ..training.configs import PEFT_METHODS
from ..training.recipes import Recipe
from .common import DataclassParser, argument
from .data import DataArguments


DEFAULT_MODEL = "openai/clip-vit-base-patch16"  # for the user's own data
RECIPE_ARGUMENTS = (  # what a recipe sets, unless the user gives it
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "max_grad_norm",
    "weight_decay",
    "dataloader_drop_last",
)
OF_RECIPE = ", by default the recipe's.%(default).0s"  # prints nothing, and keeps argparse from adding the default
SETTINGS_FILES = (".json", ".yaml", ".yml")


@dataclass
class ModelArguments:
    """The CLIP to tune."""

    model_name_or_path: str | None = argument(
        None, f"Hub id or folder of a CLIP. By default the embedded tiny one, or {DEFAULT_MODEL} for your own data."
    )
    model_revision: str = argument("main", "Branch, tag or commit of the model.")
    cache_dir: str | None = argument(None, "Folder for downloads.")
    token: str | None = argument(None, "Hub token, for private models and data sets.")
    hub_base_model_id: str | None = argument(
        None,
        "Hub id to save in the adapter as its base model, if --model_name_or_path is a folder. Others load the base "
        "model from there.",
    )


@dataclass
class DataTrainingArguments(DataArguments):
    """The images to tune and to test on; by default the embedded pictures."""

    shots: int = argument(16, "Training images per class; 0 takes all of them.")
    when_fewer: Literal["error", "all", "repeat"] | None = argument(
        None,
        "What to do with classes of fewer images than --shots: stop with an error (the default for your own data), "
        "take all of them, or repeat some.",
    )
    num_seeds: int | None = argument(
        None,
        "Number of runs, with --seed, --seed + 1, ... The table shows mean and standard deviation. By default 3 on "
        "the embedded pictures, otherwise 1.",
    )
    augment: bool = argument(
        False, "Random resized crops and flips of the training images. The image tower then runs in every step."
    )


@dataclass
class PromptArguments:
    """The prompt to learn."""

    method: Literal[tuple(sorted([*PRESETS, *PEFT_METHODS]))] | None = argument(
        None,
        "A published method, with its prompts and its training (optimizer, schedule, learning rate, epochs, batch "
        "size), except for arguments that are given. By default the words in front of {} become vectors, trained with "
        "AdamW.",
    )
    prompt_template: str = argument("a photo of a {}.", "The prompt to start from; {} stands for the class name.")
    num_virtual_tokens: int | None = argument(
        None, "Number of learned vectors; by default one for each word in front of {}."
    )
    prompt_tuning_init: Literal["TEXT", "RANDOM", "SAMPLE_VOCAB"] | None = argument(
        None, "Start from the words of the template (the default), or from random vectors."
    )
    prompt_tuning_init_text: str | None = argument(
        None, "Other words to start from, with as many tokens as there are vectors."
    )

    def config(self, model: CLIPModel) -> PeftConfig:
        """Returns the configuration for `model`. Raises `ValueError` if the arguments contradict each other."""
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "method"}
        if self.method is None:
            return CLIPPromptTuningConfig(**fields)
        if self.method in PEFT_METHODS:
            del fields["prompt_template"]  # which the classifier has
            if fields:
                raise ValueError(f"{next(iter(fields))} is about vectors, and --method {self.method} learns none.")
        return method_config(self.method, model, **fields)

    def recipe(
        self, model, training_args: TrainingArguments, num_examples: int, shots: int, given_by_user: set[str]
    ) -> Recipe:
        """Returns the training of the authors, or the default, changed by the arguments that the user gave."""
        names = [name for name in RECIPE_ARGUMENTS if name in given_by_user]
        given = {name: getattr(training_args, name) for name in [*names, "use_cpu", "gradient_accumulation_steps"]}
        shots = shots or math.ceil(num_examples / len(model.class_names))
        return training_recipe(self.method or "default", model, num_examples, shots, **given)


@dataclass
class PromptTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for few-shot prompt tuning."""

    output_dir: str = argument(
        "outputs/prompt_tuning", "Folder for the adapters, one sub-folder seed1, seed2, ... for each, and the results."
    )
    overwrite_output_dir: bool = argument(False, "Replace adapters of another training in --output_dir.")
    num_train_epochs: float = argument(100, f"Passes over the training images{OF_RECIPE}")
    per_device_train_batch_size: int = argument(32, f"Images per training step and device{OF_RECIPE}")
    per_device_eval_batch_size: int = argument(64, "Images per evaluation step and device.")
    learning_rate: float = argument(2e-3, f"Peak learning rate{OF_RECIPE}")
    lr_scheduler_type: str = argument("cosine", f"Learning rate schedule{OF_RECIPE}")
    logging_steps: float = argument(0.25, "Steps, or share of all steps, between two logs.")
    save_strategy: str = argument(
        "no", "When to save checkpoints: no, epoch or steps. --resume_from_checkpoint needs them."
    )
    save_total_limit: int | None = argument(1, "Number of checkpoints to keep.")
    use_cpu: bool = argument(not torch.accelerator.is_available(), "Use the CPU even if there is a GPU.")
    dataloader_pin_memory: bool = argument(
        torch.accelerator.is_available(), "Pin memory, for a faster transfer to a GPU."
    )
    hub_strategy: str = argument("end", "When to push.")
    seed: int = argument(1, "Draws the images and orders them.")


def parse_arguments() -> tuple[
    ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments, set[str]
]:
    """Parses the command line, and the JSON or YAML file that may stand at its beginning.

    Returns:
        `tuple`: The arguments of each kind, and the names of those that the user gave.

    Raises:
        ValueError: If there are unknown or bad arguments.
    """
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith(SETTINGS_FILES):
        arguments = [*arguments_in(arguments[0]), *arguments[1:]]
    model_args, data_args, prompt_args, training_args = parser().parse(arguments)
    given = names_in(arguments)
    data_args.check(given)
    fill_in_defaults(model_args, data_args)
    return model_args, data_args, prompt_args, training_args, given


def parser() -> DataclassParser:
    """The parser of all arguments."""
    return DataclassParser((ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments))


def arguments_in(file: str) -> list[str]:
    """Returns the settings in a JSON or YAML file as arguments of a command line.

    Raises:
        ValueError: If it is no mapping of names to values.
    """
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file!r} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file!r} must hold names and values, such as 'shots: 4' in YAML.")
    arguments = []
    for name, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def names_in(arguments: Sequence[str]) -> set[str]:
    """Returns the names of the flags among the arguments of a command line."""
    flags = (given.partition("=")[0] for given in arguments if given.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def fill_in_defaults(model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Sets the defaults that differ between the embedded pictures and the user's own data."""
    embedded = data_args.is_embedded
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = TINY_CLIP if embedded else DEFAULT_MODEL
    elif os.path.isdir(model_args.model_name_or_path):
        # the adapter saves this path, and must find its base model from any working directory
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    if data_args.num_seeds is None:
        data_args.num_seeds = 3 if embedded else 1
    if data_args.when_fewer is None:
        data_args.when_fewer = "all" if embedded else "error"
