"""The arguments of the command `train`, and their checks before any work is done."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import CLIPModel, HfArgumentParser, TrainingArguments

from .. import PRESETS, CLIPPromptTuningConfig, training_recipe
from ..assets import TINY_CLIP
from ..data.known_datasets import STYLES
from ..evaluation.model_card import is_hub_id
from ..training.recipes import Recipe
from .common import argument, program_name
from .resume import find_checkpoint


logger = logging.getLogger(__name__)

DEFAULT_MODEL = "openai/clip-vit-base-patch16"  # for the user's own data
RECIPE_ARGUMENTS = (  # what a recipe sets, unless the user gives it
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "per_device_train_batch_size",
    "max_grad_norm",
    "dataloader_drop_last",
)
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
class DataTrainingArguments:
    """The images to tune and to test on; by default the embedded pictures."""

    style: Literal[STYLES] = argument(STYLES[0], "Style of the embedded pictures to tune on.")
    dataset_name: str | None = argument(None, "Hub id of an image classification data set.")
    dataset_config_name: str | None = argument(None, "Name of its configuration.")
    train_dir: str | None = argument(None, "Folder of training images, with one sub-folder for each class.")
    validation_dir: str | None = argument(None, "The same for validation.")
    test_dir: str | None = argument(None, "The same for the final table.")
    train_file: str | None = argument(None, "Parquet file with training images and labels.")
    validation_file: str | None = argument(None, "The same for validation.")
    test_file: str | None = argument(None, "The same for the final table.")
    zhou_split: str | None = argument(None, "Published split split_zhou_NAME.json, together with --image_dir.")
    image_dir: str | None = argument(None, "Folder that the paths in --zhou_split are relative to.")
    webdataset_dir: str | None = argument(None, "Folder in the layout of CLIP_benchmark: tar files, classnames.txt.")
    image_column_name: str | None = argument(None, "Column of the images; found by default.")
    label_column_name: str | None = argument(None, "Column of the labels; found by default.")
    train_val_split: float = argument(
        0.2, "Share of the training images to test on, if there are neither test nor validation images."
    )
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

    def source(self, kind: Literal["dir", "file"]) -> dict[str, str]:
        """Returns the given folders or files by split."""
        paths = {split: getattr(self, f"{split}_{kind}") for split in ("train", "validation", "test")}
        return {split: path for split, path in paths.items() if path is not None}

    @property
    def sources(self) -> list:
        """The sources that were given; at most one is allowed."""
        known = self.dataset_name, self.source("dir"), self.source("file"), self.zhou_split, self.webdataset_dir
        return [source for source in known if source]

    @property
    def is_embedded(self) -> bool:
        """Whether to tune on the embedded pictures."""
        return not self.sources

    @property
    def name(self) -> str:
        """The name of the training data."""
        source = self.sources[0] if self.sources else self.style
        return source if isinstance(source, str) else source.get("train", self.style)


@dataclass
class PromptArguments:
    """The prompt to learn."""

    method: Literal[tuple(sorted(PRESETS))] | None = argument(
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

    def config(self, model: CLIPModel) -> CLIPPromptTuningConfig:
        """Returns the configuration for `model`. Raises `ValueError` if the arguments contradict each other."""
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "method"}
        if self.method is None:
            return CLIPPromptTuningConfig(**fields)
        return CLIPPromptTuningConfig.from_preset(self.method, model=model, **fields)

    def recipe(self, model, training_args: TrainingArguments, num_examples: int, shots: int) -> Recipe:
        """Returns the training of the authors, or the default, changed by the arguments that the user gave."""
        names = [name for name in RECIPE_ARGUMENTS if given_by_user(name)]
        given = {name: getattr(training_args, name) for name in [*names, "use_cpu", "gradient_accumulation_steps"]}
        shots = shots or math.ceil(num_examples / len(model.class_names))
        return training_recipe(self.method or "default", model, num_examples, shots, **given)


@dataclass
class PromptTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for few-shot prompt tuning."""

    output_dir: str = argument("outputs/prompt_tuning", "Folder for the adapter.")
    num_train_epochs: float = argument(100, "Passes over the training images, by default the recipe's.")
    per_device_train_batch_size: int = argument(32, "Images per training step and device, by default the recipe's.")
    per_device_eval_batch_size: int = argument(64, "Images per evaluation step and device.")
    learning_rate: float = argument(2e-3, "Peak learning rate, by default the recipe's.")
    lr_scheduler_type: str = argument("cosine", "Learning rate schedule.")
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
    remove_unused_columns: bool = argument(False, "Must be left as it is: transforms need the images.")


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments]:
    """Parses the command line, or the one JSON or YAML file that is named there."""
    classes = (ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments)
    parser = HfArgumentParser(classes, prog=program_name())
    file = settings_file()
    if file is None:
        parsed = parser.parse_args_into_dataclasses()
    elif file.endswith(".json"):
        parsed = parser.parse_json_file(file)
    else:
        parsed = parser.parse_yaml_file(file)
    fill_in_defaults(*parsed[:2])
    return parsed


def settings_file() -> str | None:
    """Returns the file that is given in place of arguments."""
    return sys.argv[1] if len(sys.argv) == 2 and sys.argv[1].endswith(SETTINGS_FILES) else None


def given_by_user(name: str) -> bool:
    """Returns whether an argument is given on the command line, or in the file that is named there."""
    if file := settings_file():
        return name in yaml.safe_load(Path(file).read_text())  # JSON is YAML, too
    return any(given.partition("=")[0] == f"--{name}" for given in sys.argv[1:])


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


def plan_runs(model_args, data_args, training_args) -> list[TrainingArguments]:
    """Returns the training arguments of every seed.

    Raises:
        ValueError: If arguments do not go together, or a folder holds checkpoints of an earlier run.
    """
    if len(data_args.sources) > 1:
        raise ValueError(
            "Give only one of --dataset_name, --train_dir ..., --train_file ..., --zhou_split and --webdataset_dir."
        )
    name = model_args.model_name_or_path
    if not os.path.isdir(name) and not is_hub_id(name):
        raise ValueError(f"The model {name!r} is neither a folder nor a Hub id.")
    shots, num_seeds = data_args.shots, data_args.num_seeds
    if shots < 0 or num_seeds < 1:
        raise ValueError(f"--shots must be 0 or more and --num_seeds 1 or more, got {shots} and {num_seeds}.")
    if num_seeds > 1 and training_args.push_to_hub:
        raise ValueError("--push_to_hub pushes one adapter; add --num_seeds 1, and --seed to say which.")
    if num_seeds > 1 and training_args.resume_from_checkpoint not in (None, "true"):
        raise ValueError("With several seeds, --resume_from_checkpoint takes 'true': each has its own checkpoint.")
    if training_args.push_to_hub and not is_hub_id(model_args.hub_base_model_id or name):
        logger.warning(
            "The adapter's base model is the folder %r, so nobody else can load it. Push the base model, too, and "
            "name it with --hub_base_model_id ORGANISATION/NAME.",
            name,
        )
    runs = [training_args]
    if num_seeds > 1:
        runs = [
            replace(training_args, seed=seed, output_dir=os.path.join(training_args.output_dir, f"seed{seed}"))
            for seed in range(training_args.seed, training_args.seed + num_seeds)
        ]
    for run_args in runs:
        find_checkpoint(run_args)
    return runs
