"""Checks of the arguments of the command `train`, before images are read and embedded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from peft.utils import CONFIG_NAME
from transformers import EvalPrediction, TrainingArguments

from ..evaluation.metrics import compute_metrics
from ..evaluation.model_card import is_hub_id
from ..evaluation.tables import counted
from ..training.callbacks import GaussianPromptAveraging
from ..training.heads import TwoStageTuning
from ..training.recipes import Recipe
from ..tuner.files import adapter_folders, holds_model
from .data import HELD_OUT, images_per_class


logger = logging.getLogger(__name__)

Rule = tuple[Callable[[float], bool], str]
POSITIVE: Rule = (lambda value: 0 < value < math.inf, "more than 0")
NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf, "0 or more")
AT_LEAST_ONE: Rule = (lambda value: 1 <= value < math.inf, "1 or more")
SHARE: Rule = (lambda value: 0 <= value < 1, "from 0 to less than 1")
# What each number of the Trainer may be. The Trainer finds out late or, as with negative epochs, never.
RULES: dict[str, Rule] = {
    "num_train_epochs": POSITIVE,
    "learning_rate": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "eval_accumulation_steps": AT_LEAST_ONE,
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
}
# Arguments of the Trainer that the command needs as they are.
FIXED = {
    "prediction_loss_only": False,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "label_names": None,
}


def check_numbers(args, rules: Mapping[str, Rule]) -> None:
    """Raises `ValueError` if an argument is not what its rule allows. `None` is always allowed."""
    for name, (is_allowed, expected) in rules.items():
        value = getattr(args, name)
        if value is not None and not is_allowed(value):
            raise ValueError(f"--{name} must be {expected}, got {value}.")


def check_training(training_args: TrainingArguments) -> None:
    """Raises `ValueError` if an argument of the Trainer has a value that makes no sense here."""
    check_numbers(training_args, RULES)
    if training_args.max_steps != -1 and training_args.max_steps < 1:
        raise ValueError(f"--max_steps must be 1 or more, got {training_args.max_steps}; without it, epochs count.")
    for name, value in FIXED.items():
        if getattr(training_args, name) != value:
            raise ValueError(f"--{name} {getattr(training_args, name)} does not go with this command; leave it out.")
    if not training_args.output_dir:
        raise ValueError("--output_dir must be the name of a folder, got ''.")
    metric = training_args.metric_for_best_model
    if metric is not None:
        known = ["loss", *compute_metrics(EvalPrediction(np.eye(6), np.arange(6)))]
        if metric.removeprefix("eval_") not in known:
            raise ValueError(f"There is no --metric_for_best_model {metric!r}; there are {', '.join(known)}.")


def check_base_model(name: str, flag: str = "--model_name_or_path") -> None:
    """Raises `ValueError` if a base model is neither a folder nor a Hub id, or an adapter."""
    if not os.path.isdir(name):
        if not is_hub_id(name):
            raise ValueError(f"{flag} {name!r} is neither a folder nor a Hub id.")
        return
    is_adapter = os.path.isfile(os.path.join(name, CONFIG_NAME))
    adapters = [name] if is_adapter else [] if holds_model(name) else adapter_folders(name)
    if adapters:
        raise ValueError(
            f"{flag} {name!r} {'is an adapter' if is_adapter else 'holds adapters'}, and not a model. Name the base "
            f"model instead; that of the adapter {adapters[0]!r} stands in its {CONFIG_NAME}."
        )


def check_runs(model_args, data_args, training_args) -> None:
    """Raises `ValueError` if arguments about the model, the seeds and the Hub are wrong or do not go together."""
    name = model_args.model_name_or_path
    check_base_model(name)
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


def check_shots(train: Dataset, validation: Dataset | None, test_sets, data_args) -> None:
    """Checks the numbers of images.

    Raises:
        ValueError: If all are of one class, or if a class has fewer than `--shots`, unless `--when_fewer` says what to
            do.
    """
    classes = images_per_class(train)
    if len(classes) == 1:
        raise ValueError(
            f"The training images are of one class only, {next(iter(classes))!r}, so there is nothing to tell apart. "
            "Give images of at least two classes."
        )
    if not data_args.shots or data_args.when_fewer != "error":
        return
    needs = {"training": (train, data_args.shots), "validation": (validation, min(data_args.shots, 4))}
    for kind, (dataset, number) in needs.items():
        counts = {} if dataset is None else images_per_class(dataset)
        few = {name: count for name, count in counts.items() if count < number}
        if few:
            shown = ", ".join(f"{name} {count}" for name, count in list(few.items())[:10])
            held_out = " (others are held out for the test)" if HELD_OUT in test_sets and kind == "training" else ""
            raise ValueError(
                f"--shots {data_args.shots} asks for {counted(number, f'{kind} image')} of each class, but "
                f"{len(few)} of {counted(len(counts), 'class')} {'has' if len(few) == 1 else 'have'} fewer{held_out}: "
                f"{shown}{', ...' if len(few) > 10 else ''}. Use --shots {min(few.values())}, or --when_fewer all."
            )


def rehearse(
    make_trainer: Callable[[TrainingArguments, Recipe], object], recipe: Recipe, run_args: TrainingArguments, config
) -> None:
    """Builds everything that a training needs, so that a bad argument is found before images are embedded.

    Args:
        make_trainer (`Callable[[TrainingArguments, Recipe], Trainer]`):
            Makes the Trainer.
        recipe (`Recipe`):
            The training of the method's authors.
        run_args (`TrainingArguments`):
            The arguments of the first training.
        config (`PeftConfig`):
            The configuration of the adapter.

    Raises:
        ValueError: If arguments do not go together. Other libraries' errors are told in one line, too.
    """
    averages = any(isinstance(callback, GaussianPromptAveraging) for callback in recipe.callbacks)
    if averages and run_args.load_best_model_at_end:
        raise ValueError("--method promptsrc averages over epochs, which --load_best_model_at_end would undo.")
    if any(isinstance(callback, TwoStageTuning) for callback in recipe.callbacks) and run_args.load_best_model_at_end:
        raise ValueError("--method 2sfs trains in two stages, which --load_best_model_at_end would mix.")
    term = getattr(config, "regularizer", None) or ("pull" if getattr(config, "pull", False) else None)
    if term is not None and run_args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor keeps the labels from the model, so it does not go with the regularizer "
            f"{term!r} of this --method."
        )
    with TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(replace(run_args, output_dir=folder, push_to_hub=False), recipe)
            trainer.create_optimizer_and_scheduler(num_training_steps=100)
            trainer.get_train_dataloader()
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # of any library that the Trainer stands on
            reason = " ".join(str(error).split())
            raise ValueError(f"The Trainer refuses these arguments ({type(error).__name__}): {reason}") from error
