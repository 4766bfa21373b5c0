"""The training settings of the default prompts and of the papers (optimizer, schedule, batch size, epochs)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from ..towers import trainable_parameters
from ..tuner import CLIPPromptTuningConfig
from ..tuner.presets import PRESETS
from .callbacks import GaussianPromptAveraging
from .distillation import DistillationTrainer
from .heads import TwoStageTuning
from .prograd import ProGradTrainer


MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
SGD = (torch.optim.SGD, {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY})
# Adam with the weight decay as a part of the gradient; TCP's README calls the large eps important.
ADAM = (torch.optim.Adam, {"eps": 1e-3, "weight_decay": WEIGHT_DECAY})


@dataclass(frozen=True)
class PaperSettings:
    """
    The settings that the authors' scripts train a preset with.

    Attributes:
        learning_rate (`float`):
            The learning rate after the warm-up.
        batch_size (`int`):
            The number of images per step over all devices.
        epochs (`int` or `dict[float, int]`):
            The number of epochs, or a mapping from the largest number of shots per class to the number of epochs.
        optimizer (`tuple`):
            The class of the optimizer and its arguments, besides the learning rate.
    """

    learning_rate: float
    batch_size: int
    epochs: int | dict[float, int]
    optimizer: tuple[Callable[..., torch.optim.Optimizer], dict] = SGD


COOP_EPOCHS = {1: 50, 4: 100, math.inf: 200}
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
    "tcp": PaperSettings(0.002, 32, 50, ADAM),
    "promptkd": PaperSettings(0.005, 8, 20),
    "promptsrc": PaperSettings(0.0025, 4, 20),
}


@dataclass(frozen=True)
class StepSettings:
    """
    The settings of a method whose authors count steps and not epochs: AdamW, and a cosine that goes on at each step.

    Attributes:
        learning_rate (`float`):
            The learning rate of the first step.
        batch_size (`int`):
            The number of images per step over all devices.
        steps_per_shot (`int`):
            The number of steps for each image of a class.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            The weight decay of AdamW.
        last_learning_rate (`float`, *optional*, defaults to 1e-6):
            The learning rate at which the cosine ends.
    """

    learning_rate: float
    batch_size: int
    steps_per_shot: int
    weight_decay: float = 1e-2
    last_learning_rate: float = 1e-6


STEP_SETTINGS: dict[str, StepSettings] = {
    "clip-lora": StepSettings(2e-4, 32, 500),
    "2sfs": StepSettings(2e-4, 32, 300),
}
FIRST_STAGE = 0.6  # share of the steps of 2sfs

# CLAP's and its baseline's, as those of prompts; Tip-Adapter-F's cosine goes on at each step, Tip-Adapter needs none.
HEAD_SGD = (torch.optim.SGD, {"momentum": MOMENTUM, "weight_decay": 0.0})
HEAD_SETTINGS: dict[str, PaperSettings] = {
    "clap": PaperSettings(0.1, 256, 300, HEAD_SGD),
    "zs-lp": PaperSettings(0.1, 256, 300, HEAD_SGD),
    "tip-adapter": PaperSettings(1e-3, 256, 0, (torch.optim.AdamW, {"eps": 1e-4, "weight_decay": 1e-2})),
    "tip-adapter-f": PaperSettings(1e-3, 256, 20, (torch.optim.AdamW, {"eps": 1e-4, "weight_decay": 1e-2})),
}
TRAINERS: dict[str, type[Trainer]] = {"prograd": ProGradTrainer, "promptkd": DistillationTrainer}
# The fields of a configuration that tell kinds of prompts apart.
KIND = (
    "class_specific",
    "image_conditioned",
    "num_vision_virtual_tokens",
    "vision_prompts_from_text",
    "class_aware_layer",
    "projection_dim",
    "regularizer",
)
DEFAULT = "default"  # the name of the recipe for a configuration without a preset
DEFAULT_BATCH_SIZE = 32
# Largest number of shots: learning rate and steps. Few images soon cost accuracy on others. Up to 4 shots, chosen on
# training images of the embedded pictures that were not drawn (for 1 shot they left a choice, which their test images
# decided); beyond, the settings that the examples always had.
DEFAULT_SETTINGS = {1: (5e-4, 50), 4: (1e-3, 100), 8: (2e-3, 300), math.inf: (2e-3, 600)}
MIN_EPOCHS = 10  # with many classes, so that every image counts
PROMPTSRC_MEAN, PROMPTSRC_STD = 15 / 20, 1 / 20  # as fractions of the number of epochs
WARMUP_LEARNING_RATE = 1e-5  # constant during the first epoch


@dataclass(frozen=True)
class Recipe:
    """
    The arguments with which a `Trainer` trains an adapter.

    Attributes:
        arguments (`dict`):
            Keyword arguments for `TrainingArguments`.
        optimizers (`tuple`):
            The optimizer and the learning rate scheduler, `None` for those of the Trainer.
        callbacks (`list[TrainerCallback]`):
            The callbacks to pass to the Trainer.
        trainer_class (`type[Trainer]`):
            The class of the Trainer.
    """

    arguments: dict
    optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None]
    callbacks: list[TrainerCallback] = field(default_factory=list)
    trainer_class: type[Trainer] = Trainer


def training_recipe(name: str, model: nn.Module, num_examples: int, shots: int = 16, **overrides) -> Recipe:
    """
    Returns the training recipe of the default prompts or of a paper.

    `"default"` is for a configuration without a preset: AdamW, a cosine schedule, and 50 (for one image per class) to
    600 steps (for more than 8) of 32 images, but at least 10 epochs. The recipes of the papers use SGD (TCP: Adam),
    one warm-up epoch, a cosine schedule that is updated once per epoch, and no gradient clipping. The batch is divided
    among the devices. `"clip-lora"` takes 500 steps of AdamW for each image per class, with a cosine schedule that is
    updated at each step. All papers train on random crops and flips, see `augment` of [`~data.with_pixel_values`].

    `"2sfs"` takes 300 steps of AdamW for each image per class: 60 % for LayerNorms, the rest for the head, each stage
    with a cosine schedule of its own, see [`TwoStageTuning`]. The other class heads train on image embeddings, after
    [`fit_class_head`]: `"clap"` and `"zs-lp"` 300 epochs of SGD, `"tip-adapter-f"` 20 of AdamW, and `"tip-adapter"`
    none.

    Args:
        name (`str`):
            `"default"`, the name of a preset, one of `PRESETS`, `"clip-lora"`, or the name of a class head.
        model (`nn.Module`):
            The model with its adapter. All of its trainable parameters are trained.
        num_examples (`int`):
            The size of the training set.
        shots (`int`, *optional*, defaults to 16):
            The number of images per class, which determines the number of epochs of the default and of some methods.
        overrides (*optional*):
            Keyword arguments for `TrainingArguments` that replace those of the recipe. The schedule takes
            `learning_rate`, `num_train_epochs`, the batch size and `gradient_accumulation_steps` into account. On a
            CPU, memory is not pinned.

    Raises:
        ValueError: If the name is unknown, there are no examples or shots, or the model has no trainable parameters.

    Example:

    ```py
    >>> recipe = training_recipe("maple", model, num_examples=len(train_dataset))
    >>> args = TrainingArguments("out", **recipe.arguments)
    >>> trainer = recipe.trainer_class(
    ...     model, args, train_dataset=train_dataset, optimizers=recipe.optimizers, callbacks=recipe.callbacks
    ... )
    ```
    """
    names = [DEFAULT, *sorted({**SETTINGS, **STEP_SETTINGS, **HEAD_SETTINGS})]
    if name not in names:
        raise ValueError(f"There is no recipe {name!r}; there are {names}.")
    if num_examples < 1 or shots < 1:
        raise ValueError(f"num_examples and shots must be 1 or more, got {num_examples} and {shots}.")
    if not torch.accelerator.is_available() or overrides.get("use_cpu", False):
        overrides = {"dataloader_pin_memory": False, **overrides}  # on a CPU, torch warns of it in every data loader
    _warn_of_other_prompts(name, model)
    if name == DEFAULT:
        return _default_recipe(model, num_examples, shots, overrides)
    if name in STEP_SETTINGS:
        recipe = _step_recipe(STEP_SETTINGS[name], model, num_examples, shots, overrides)
        return _in_two_stages(recipe, model, num_examples) if name == "2sfs" else recipe
    if name.startswith("tip-adapter"):
        return _cache_recipe(HEAD_SETTINGS[name], model, overrides)
    settings, num_devices = {**SETTINGS, **HEAD_SETTINGS}[name], _num_devices(overrides)
    epochs = settings.epochs if isinstance(settings.epochs, dict) else {math.inf: settings.epochs}
    arguments = {
        "learning_rate": settings.learning_rate,
        "num_train_epochs": next(number for max_shots, number in epochs.items() if shots <= max_shots),
        "per_device_train_batch_size": max(1, settings.batch_size // num_devices),
        "weight_decay": settings.optimizer[1]["weight_decay"],
        "max_grad_norm": 0.0,
        **overrides,
    }
    batch_size = arguments["per_device_train_batch_size"] * num_devices
    arguments.setdefault("dataloader_drop_last", num_examples >= batch_size)
    num_epochs = arguments["num_train_epochs"]
    steps_per_epoch = _steps_per_epoch(num_examples, batch_size, arguments)
    optimizers = with_epoch_cosine(model, arguments["learning_rate"], num_epochs, steps_per_epoch, settings.optimizer)
    averaging = GaussianPromptAveraging(PROMPTSRC_MEAN * num_epochs, PROMPTSRC_STD * num_epochs)
    trainer_class = TRAINERS.get(name, Trainer)
    return Recipe(arguments, optimizers, [averaging] if name == "promptsrc" else [], trainer_class)


def _default_recipe(model: nn.Module, num_examples: int, shots: int, overrides: dict) -> Recipe:
    _check_trainable(model)
    num_devices = _num_devices(overrides)
    learning_rate, num_steps = next(values for most, values in DEFAULT_SETTINGS.items() if shots <= most)
    arguments = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": max(1, DEFAULT_BATCH_SIZE // num_devices),
        "dataloader_drop_last": False,
        **overrides,
    }
    batch_size = arguments["per_device_train_batch_size"] * num_devices
    num_epochs = math.ceil(num_steps / _steps_per_epoch(num_examples, batch_size, arguments))
    return Recipe({"num_train_epochs": max(num_epochs, MIN_EPOCHS), **arguments}, (None, None))


def _step_recipe(settings: StepSettings, model: nn.Module, num_examples: int, shots: int, overrides: dict) -> Recipe:
    _check_trainable(model)
    num_devices = _num_devices(overrides)
    arguments = {
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": max(1, settings.batch_size // num_devices),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": 0.0,
        "dataloader_drop_last": False,
        **overrides,
    }
    if "lr_scheduler_type" not in overrides:
        arguments["lr_scheduler_type"] = "cosine_with_min_lr"
        arguments.setdefault("lr_scheduler_kwargs", {"min_lr": settings.last_learning_rate})
    if "num_train_epochs" not in overrides:
        num_steps = arguments.setdefault("max_steps", settings.steps_per_shot * shots)
        batch_size = arguments["per_device_train_batch_size"] * num_devices
        # the Trainer goes by max_steps; this is what reports show
        arguments["num_train_epochs"] = num_steps / _steps_per_epoch(num_examples, batch_size, arguments)
    return Recipe(arguments, (None, None))


def _in_two_stages(recipe: Recipe, model: nn.Module, num_examples: int) -> Recipe:
    """Gives LayerNorms and head of a recipe, one after the other, a cosine schedule each."""
    arguments = recipe.arguments
    num_steps = arguments.get("max_steps", -1)
    if num_steps < 1:
        batch_size = arguments["per_device_train_batch_size"] * _num_devices(arguments)
        per_epoch = _steps_per_epoch(num_examples, batch_size, arguments)
        num_steps = math.ceil(arguments["num_train_epochs"] * per_epoch)
    num_first = max(1, int(FIRST_STAGE * num_steps))
    of_head = [value for name, value in model.named_parameters() if ".ln_tuning_head." in name and value.requires_grad]
    others = [value for value in _check_trainable(model) if not any(value is own for own in of_head)]
    if not of_head or not others:
        raise ValueError(
            "The recipe '2sfs' trains LayerNorms and a class head; make both with method_config('2sfs', model)."
        )
    lr = arguments["learning_rate"]
    groups = [{"params": others}, {"params": of_head}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=arguments["weight_decay"])
    last = STEP_SETTINGS["2sfs"].last_learning_rate / lr
    stages = [(0, num_first), (num_first, num_steps - num_first)]
    scheduler = LambdaLR(optimizer, [partial(_cosine_of_stage, first, number, last) for first, number in stages])
    return replace(recipe, optimizers=(optimizer, scheduler), callbacks=[TwoStageTuning(num_first)])


def _cosine_of_stage(first: int, number: int, last: float, step: int) -> float:
    """Returns the factor of the learning rate in a stage of `number` steps from `first` on; 0 in the other stage."""
    if not 0 <= step - first < number:
        return 0.0
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (step - first) / number))


def _cache_recipe(settings: PaperSettings, model: nn.Module, overrides: dict) -> Recipe:
    """Returns the recipe for the keys of a cache: AdamW of the Trainer, whose cosine goes on at each step to 0."""
    arguments = {
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": max(1, settings.batch_size // _num_devices(overrides)),
        "weight_decay": settings.optimizer[1]["weight_decay"],
        "adam_epsilon": settings.optimizer[1]["eps"],
        "max_grad_norm": 0.0,
        "dataloader_drop_last": False,
        **overrides,
    }
    if not trainable_parameters([model]) and (arguments["num_train_epochs"] > 0 or arguments.get("max_steps", -1) > 0):
        raise ValueError(
            "The cache of 'tip-adapter' is filled and not trained, so it takes no epochs and no steps; leave "
            "num_train_epochs and max_steps out, or train its keys: 'tip-adapter-f'."
        )
    return Recipe(arguments, (None, None))


def _warn_of_other_prompts(name: str, model: nn.Module) -> None:
    """Warns if a model has prompts of another kind than those that the recipe of a paper is for."""
    if name == DEFAULT or not isinstance(model, PeftModel):
        return
    for config in (model.peft_config[adapter] for adapter in model.active_adapters):
        other = _other_kind(name, config) if isinstance(config, CLIPPromptTuningConfig) else None
        if other is not None:
            warnings.warn(
                f"The recipe {name!r} is for other prompts than those of the model, whose configuration {other}. Make "
                f"the adapter with get_peft_model(model, method_config({name!r}, model)), or leave it so to train "
                "other prompts with these settings.",
                UserWarning,
                stacklevel=3,
            )


def _other_kind(name: str, config: CLIPPromptTuningConfig) -> str | None:
    """Returns in what prompts differ from those of a method, or `None` if they are of its kind."""
    if name not in PRESETS:
        return "learns vectors"
    fields = (field for field in KIND if bool(getattr(config, field)) != bool(PRESETS[name].get(field)))
    first = next(fields, None)
    return None if first is None else f"has {first}={getattr(config, first)!r}"


def _num_devices(arguments: dict) -> int:
    """Returns the number of devices that the Trainer will use: one per process, or all GPUs of a single process."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 or arguments.get("use_cpu", False):
        return num_processes
    return max(1, torch.cuda.device_count())


def _steps_per_epoch(num_examples: int, batch_size: int, arguments: dict) -> int:
    round_batches = math.floor if arguments["dataloader_drop_last"] else math.ceil
    num_batches = max(1, round_batches(num_examples / batch_size))
    return math.ceil(num_batches / arguments.get("gradient_accumulation_steps", 1))


def with_epoch_cosine(
    model: nn.Module,
    learning_rate: float,
    num_epochs: int,
    steps_per_epoch: int,
    optimizer: tuple[Callable[..., torch.optim.Optimizer], dict] = SGD,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """
    Returns an optimizer with weight decay for all trainable parameters, and the schedule of [`epoch_learning_rate`].

    Raises:
        ValueError: If the model has no trainable parameters.
    """
    optimizer_class, arguments = optimizer
    made = optimizer_class(_check_trainable(model), lr=learning_rate, **arguments)

    def factor(step: int) -> float:
        return epoch_learning_rate(step // steps_per_epoch, learning_rate, num_epochs) / learning_rate

    return made, LambdaLR(made, factor)


def epoch_learning_rate(epoch: int, learning_rate: float, num_epochs: int) -> float:
    """
    Returns the learning rate of an epoch: 1e-5 in epoch 0, then a half cosine over `num_epochs` epochs.

    The cosine starts at epoch 1, so training ends before it reaches 0.

    Source:
        The authors' code on Dassl, in which the schedule restarts after the warm-up epoch.
    """
    if epoch == 0:
        return WARMUP_LEARNING_RATE
    return 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch - 1) / num_epochs))


def _check_trainable(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable parameters, of which there must be some."""
    parameters = trainable_parameters([model])
    if not parameters:
        raise ValueError("The model has nothing to train; put an adapter into it first, or load it with is_trainable.")
    return parameters
