"""The arguments of the command `train`, on the command line or in a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft import PeftConfig
from transformers import CLIPModel, TrainingArguments

from clip_prompt_cli.fields import (
    DEFAULT_MODEL,
    DataTrainingFields,
    ModelArguments,
    PromptFields,
    TrainerFields,
    argument,
)
from clip_prompt_cli.parsers import SETTINGS_FILES

from .. import CLIPPromptTuningConfig, method_config, training_recipe
from ..assets import TINY_CLIP
from ..training.configs import PEFT_METHODS
from ..training.recipes import Recipe
from .common import DataclassParser
from .data import DataArguments


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


@dataclass
class DataTrainingArguments(DataArguments, DataTrainingFields):
    """The images to tune and to test on; by default the embedded pictures."""


@dataclass
class PromptArguments(PromptFields):
    """The prompt to learn."""

    def config(self, model: CLIPModel, **of_teacher) -> PeftConfig:
        """Returns the configuration for `model`. Raises `ValueError` if the arguments contradict each other."""
        given = {name: value for name, value in vars(self).items() if name not in ("method", "teacher")}
        fields = {**{name: value for name, value in given.items() if value is not None}, **of_teacher}
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
        names += ["use_cpu", "gradient_accumulation_steps", "dataloader_pin_memory"]
        given = {name: getattr(training_args, name) for name in names}
        shots = shots or math.ceil(num_examples / len(model.class_names))
        return training_recipe(self.method or "default", model, num_examples, shots, **given)


@dataclass
class PromptTrainingArguments(TrainerFields, TrainingArguments):
    """`TrainingArguments` with defaults for few-shot prompt tuning."""

    use_cpu: bool = argument(not torch.accelerator.is_available(), "Use the CPU even if there is a GPU.")
    dataloader_pin_memory: bool = argument(
        torch.accelerator.is_available(), "Pin memory, for a faster transfer to a GPU."
    )


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments, set[str]]:
    """Parses a command line, and the JSON or YAML file that may stand at its beginning.

    Returns:
        `tuple`: The arguments of each kind, and the names of those that the user gave.

    Raises:
        ValueError: If there are unknown or bad arguments.
    """
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
