"""How the papers train: optimizer, schedule, batch and epochs of each preset, for the Trainer."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from ..tuner.presets import PRESETS
from .callbacks import GaussianPromptAveraging
from .prograd import ProGradTrainer


MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARMUP_LEARNING_RATE = 1e-5  # constant, for the first epoch

# Epochs by number of shots; at most as many as the key.
COOP_EPOCHS = {1: 50, 4: 100, math.inf: 200}


@dataclass(frozen=True)
class PaperSettings:
    """What the authors' scripts train a preset with."""

    learning_rate: float
    batch_size: int
    epochs: int | dict[float, int]


SETTINGS: dict[str, PaperSettings] = {
    "coop": PaperSettings(0.002, 32, COOP_EPOCHS),
    "coop-csc": PaperSettings(0.002, 32, COOP_EPOCHS),
    "cocoop": PaperSettings(0.002, 1, 10),
    "vpt-shallow": PaperSettings(0.0025, 4, 5),
    "vpt-deep": PaperSettings(0.0025, 4, 5),
    "ivlp": PaperSettings(0.0025, 4, 20),
    "maple": PaperSettings(0.0035, 4, 5),
    "kgcoop": PaperSettings(0.002, 128, 100),
    "prograd": PaperSettings(0.002, 32, COOP_EPOCHS),
    "promptsrc": PaperSettings(0.0025, 4, 20),
}
PROMPTSRC_MEAN, PROMPTSRC_STD = 15 / 20, 1 / 20  # of the number of epochs


@dataclass(frozen=True)
class Recipe:
    """
    What a `Trainer` is given to train as a paper does.

    Attributes:
        arguments: keywords for `TrainingArguments`.
        optimizers: optimizer and scheduler.
        callbacks: for the Trainer.
        trainer_class: the Trainer to use.
    """

    arguments: dict
    optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None]
    callbacks: list[TrainerCallback] = field(default_factory=list)
    trainer_class: type[Trainer] = Trainer


def training_recipe(name: str, model: nn.Module, num_examples: int, shots: int = 16, **overrides) -> Recipe:
    """The training of a paper: SGD, one epoch of warm-up, a cosine that moves once an epoch, no clipping of gradients.

    The batch is shared out among the devices.

    Args:
        name: one of `clip_prompt_peft.presets.PRESETS`.
        model: with its adapter in it; what is trainable is trained.
        num_examples: size of the training set.
        shots: images per class, on which the number of epochs of some methods depends.
        overrides: keywords for `TrainingArguments` to set otherwise; `learning_rate`, `num_train_epochs`, the batch
            size and `gradient_accumulation_steps` are heeded by the schedule.

    Raises:
        ValueError: unknown name, nothing to train.

    Example:

    ```py
    >>> recipe = training_recipe("maple", model, num_examples=len(train_dataset))
    >>> args = TrainingArguments("out", **recipe.arguments)
    >>> trainer = recipe.trainer_class(
    ...     model, args, train_dataset=train_dataset, optimizers=recipe.optimizers, callbacks=recipe.callbacks
    ... )
    ```
    """
    if name not in SETTINGS:
        raise ValueError(f"There is no recipe {name!r}; there are {sorted(SETTINGS)}.")
    settings = SETTINGS[name]
    num_devices = _num_devices(overrides)
    arguments = {
        "learning_rate": settings.learning_rate,
        "num_train_epochs": _epochs(settings.epochs, shots),
        "per_device_train_batch_size": max(1, settings.batch_size // num_devices),
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 0.0,
        **overrides,
    }
    batch_size = arguments["per_device_train_batch_size"] * num_devices
    arguments.setdefault("dataloader_drop_last", num_examples >= batch_size)
    num_epochs = arguments["num_train_epochs"]
    optimizers = sgd_with_epoch_cosine(
        model, arguments["learning_rate"], num_epochs, _steps_per_epoch(num_examples, batch_size, arguments)
    )
    callbacks = []
    if name == "promptsrc":
        callbacks.append(GaussianPromptAveraging(PROMPTSRC_MEAN * num_epochs, PROMPTSRC_STD * num_epochs))
    trainer_class = ProGradTrainer if PRESETS[name].get("regularizer") == "prograd" else Trainer
    return Recipe(arguments, optimizers, callbacks, trainer_class)


def sgd_with_epoch_cosine(
    model: nn.Module, learning_rate: float, num_epochs: int, steps_per_epoch: int
) -> tuple[torch.optim.SGD, LambdaLR]:
    """SGD on all that is trainable, weight decay included, with the schedule of [`epoch_learning_rate`].

    Raises:
        ValueError: if nothing is trainable.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("The model has nothing to train; put an adapter into it first, or load it with is_trainable.")
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def factor(step: int) -> float:
        return epoch_learning_rate(step // steps_per_epoch, learning_rate, num_epochs) / learning_rate

    return optimizer, LambdaLR(optimizer, factor)


def epoch_learning_rate(epoch: int, learning_rate: float, num_epochs: int) -> float:
    """1e-5 in epoch 0; from epoch 1 on half a cosine of `num_epochs` epochs, which training ends before the end of.

    Source: the authors' code on Dassl, where the cosine starts anew after the warm-up epoch.
    """
    if epoch == 0:
        return WARMUP_LEARNING_RATE
    return 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch - 1) / num_epochs))


def _epochs(epochs, shots: int) -> int:
    if isinstance(epochs, int):
        return epochs
    return next(number for at_most, number in epochs.items() if shots <= at_most)


def _num_devices(arguments: dict) -> int:
    """As many as the Trainer will use: one for each process, or all GPUs of a single one."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 or arguments.get("use_cpu", False):
        return num_processes
    return max(1, torch.cuda.device_count())


def _steps_per_epoch(num_examples: int, batch_size: int, arguments: dict) -> int:
    round_batches = math.floor if arguments["dataloader_drop_last"] else math.ceil
    num_batches = max(1, round_batches(num_examples / batch_size))
    return math.ceil(num_batches / arguments.get("gradient_accumulation_steps", 1))
