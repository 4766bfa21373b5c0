"""The arguments of run_prompt_tuning.py, and what can be checked of them before any work."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
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
from .resume import find_checkpoint


logger = logging.getLogger(__name__)


DEFAULT_MODEL = "openai/clip-vit-base-patch16"  # for data of one's own


@dataclass
class ModelArguments:
    """Which CLIP to tune."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": f"Hub id or folder of a CLIP. By default the tiny one that comes with the examples, or, with data "
            f"of your own, {DEFAULT_MODEL}."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private models and data sets."})
    hub_base_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id to note in the adapter as its base model, if --model_name_or_path is a folder: under that "
            "id others will look for it."
        },
    )


@dataclass
class DataTrainingArguments:
    """What to tune and to evaluate on. Without any source: the pictures that come with the examples."""

    style: Literal[STYLES] = field(
        default=STYLES[0], metadata={"help": "Which of the pictures that come with the examples to tune on."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "An image classification data set of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with training images, in one sub-folder for each class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    test_dir: str | None = field(default=None, metadata={"help": "The same for the final table."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with training images and labels."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for the final table."})
    zhou_split: str | None = field(
        default=None,
        metadata={"help": "Published split, split_zhou_NAME.json; --image_dir says where the images are."},
    )
    image_dir: str | None = field(default=None, metadata={"help": "Folder that its paths are relative to."})
    webdataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of tar files with classnames.txt, in the layout of CLIP_benchmark."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images; found by default."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels; found by default."})
    train_val_split: float = field(
        default=0.2,
        metadata={"help": "Share of the training images to evaluate on, if there are neither test nor validation."},
    )
    shots: int = field(default=16, metadata={"help": "Training images per class; 0 takes all there are."})
    when_fewer: Literal["error", "all", "repeat"] | None = field(
        default=None,
        metadata={
            "help": "What to do with a class of fewer images than --shots: stop with an error (the default for data "
            "of your own), take all of them, or repeat some."
        },
    )
    num_seeds: int | None = field(
        default=None,
        metadata={
            "help": "How often to repeat all, with --seed, --seed + 1, ... The table shows mean and standard "
            "deviation. By default 1, and 3 on the pictures that come with the examples."
        },
    )
    augment: bool = field(
        default=False,
        metadata={
            "help": "Random resized crops and mirroring of the training images. The image tower then runs in every "
            "step; without, it runs once."
        },
    )

    def source(self, kind: str) -> dict[str, str]:
        """Split to path, for the kind 'dir' or 'file'."""
        paths = {split: getattr(self, f"{split}_{kind}") for split in ("train", "validation", "test")}
        return {split: path for split, path in paths.items() if path is not None}

    @property
    def name(self) -> str:
        """What to call the data that is tuned on."""
        paths = {**self.source("dir"), **self.source("file")}
        return self.dataset_name or paths.get("train") or self.zhou_split or self.webdataset_dir or self.style

    @property
    def is_embedded(self) -> bool:
        return not any(self.sources)

    @property
    def sources(self) -> tuple:
        """All there can be; one is to be given, or none."""
        return self.dataset_name, self.source("dir"), self.source("file"), self.zhou_split, self.webdataset_dir


@dataclass
class PromptArguments:
    """What to learn."""

    method: Literal[tuple(sorted(PRESETS))] | None = field(
        default=None,
        metadata={
            "help": "A published method: its prompts, and its training (optimizer, learning rate, epochs, batch size, "
            "schedule), except for what is given here otherwise. By default vectors in place of the words in front of "
            "{}, trained with AdamW."
        },
    )
    prompt_template: str = field(
        default="a photo of a {}.", metadata={"help": "The prompt to start from; {} is where the class name goes."}
    )
    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Number of learned vectors; by default one for each word in front of {}."}
    )
    prompt_tuning_init: Literal["TEXT", "RANDOM", "SAMPLE_VOCAB"] | None = field(
        default=None,
        metadata={"help": "Start from the words of the template, or from random vectors; by default TEXT."},
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Other words to start from, as many tokens as there are vectors."}
    )

    def config(self, model: CLIPModel) -> CLIPPromptTuningConfig:
        """The configuration for `model`. Raises `ValueError` if it contradicts itself."""
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "method"}
        if self.method is None:
            return CLIPPromptTuningConfig(**fields)
        return CLIPPromptTuningConfig.from_preset(self.method, model=model, **fields)

    def recipe(self, model, training_args: TrainingArguments, num_examples: int, shots: int) -> Recipe:
        """How `model` is trained: as the authors of the method do, but as the user says where they say something."""
        if self.method is None:
            return Recipe({}, (None, None))
        heeded = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_grad_norm")
        given = {name: getattr(training_args, name) for name in heeded if given_by_user(name)}
        same = {name: getattr(training_args, name) for name in ("use_cpu", "gradient_accumulation_steps")}
        return training_recipe(self.method, model, num_examples, shots or 16, **same, **given)


@dataclass
class PromptTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of few-shot prompt tuning."""

    output_dir: str = field(default="outputs/prompt_tuning", metadata={"help": "Where the adapter goes."})
    num_train_epochs: float = field(default=100, metadata={"help": "How often to go through the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images in a step, on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How it goes down."})
    logging_steps: float = field(default=0.25, metadata={"help": "Steps, or share of all steps, between two logs."})
    save_strategy: str = field(
        default="no",
        metadata={"help": "When to save checkpoints: no, epoch or steps. --resume_from_checkpoint needs them."},
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(), metadata={"help": "Use the CPU even where there is a GPU."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin memory, for a faster transfer to a GPU."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push."})
    seed: int = field(default=1, metadata={"help": "Draws the images and orders them."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: transforms need the images."})


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments]:
    """From the command line, or from the one json or yaml file that is named there."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, PromptArguments, PromptTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(sys.argv[1])
    else:
        parsed = parser.parse_args_into_dataclasses()
    _fill_in_defaults(*parsed[:2])
    return parsed


def _fill_in_defaults(model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """The defaults that depend on whether the data are those of the examples."""
    embedded = data_args.is_embedded
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = TINY_CLIP if embedded else DEFAULT_MODEL
    elif os.path.isdir(model_args.model_name_or_path):
        # the adapter notes its base model, and is to be found from any folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    if data_args.num_seeds is None:
        data_args.num_seeds = 3 if embedded else 1
    if data_args.when_fewer is None:
        data_args.when_fewer = "all" if embedded else "error"


def given_by_user(name: str) -> bool:
    """Whether an argument stands on the command line, or in the file that is named there."""
    if len(sys.argv) == 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        return name in yaml.safe_load(Path(sys.argv[1]).read_text())  # json is yaml, too
    return any(argument.partition("=")[0] == f"--{name}" for argument in sys.argv[1:])


def plan_runs(model_args, data_args, training_args) -> list[TrainingArguments]:
    """The training arguments of every seed.

    Raises:
        ValueError: arguments that do not go together, or a folder that holds the checkpoints of an earlier run.
    """
    if sum(map(bool, data_args.sources)) > 1:
        raise ValueError(
            "Give only one of --dataset_name, --train_dir ..., --train_file ..., --zhou_split and --webdataset_dir."
        )
    name = model_args.model_name_or_path
    if not os.path.isdir(name) and not is_hub_id(name):
        raise ValueError(f"The model {name!r} is neither a folder nor a Hub id.")
    num_seeds = data_args.num_seeds
    if data_args.shots < 0 or num_seeds < 1:
        raise ValueError(
            f"--shots must be 0 or more and --num_seeds 1 or more, got {data_args.shots} and {num_seeds}."
        )
    if num_seeds > 1 and training_args.push_to_hub:
        raise ValueError("--push_to_hub pushes one adapter; add --num_seeds 1, and --seed to say which.")
    if num_seeds > 1 and training_args.resume_from_checkpoint not in (None, "true"):
        raise ValueError("With several seeds, --resume_from_checkpoint takes 'true': each has its own checkpoint.")
    if training_args.push_to_hub:
        _warn_about_local_base(model_args)
    runs = [training_args]
    if num_seeds > 1:
        seeds = range(training_args.seed, training_args.seed + num_seeds)
        folders = {seed: os.path.join(training_args.output_dir, f"seed{seed}") for seed in seeds}
        runs = [replace(training_args, seed=seed, output_dir=folder) for seed, folder in folders.items()]
    for run_args in runs:
        find_checkpoint(run_args)
    return runs


def _warn_about_local_base(model_args: ModelArguments) -> None:
    if not is_hub_id(model_args.hub_base_model_id or model_args.model_name_or_path):
        logger.warning(
            "You push an adapter whose base model is the folder %r, so nobody else can load it. Push the base model "
            "too, or name where it comes from, with --hub_base_model_id ORGANISATION/NAME.",
            model_args.model_name_or_path,
        )


def use_one_thread_if_tiny(model_name_or_path: str) -> None:
    """The tiny CLIP gains nothing from more threads; on a busy machine their waiting for each other makes it slow."""
    if model_name_or_path == TINY_CLIP:
        torch.set_num_threads(1)
