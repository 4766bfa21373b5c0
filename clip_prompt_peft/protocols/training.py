"""How the adapters of all methods are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

from peft import LoraConfig
from transformers import PrinterCallback, TrainingArguments

from ..classifier import CLIPForPromptClassification
from ..recipes import Recipe, training_recipe
from .image_set import ImageSet
from .settings import TrainingSettings


@dataclass(frozen=True)
class Backbone:
    """
    The CLIP that all methods start from.

    Attributes:
        model: without adapters. A method may put one in, and takes it out again.
        image_processor: of the model.
        settings: of training.
    """

    model: CLIPForPromptClassification
    image_processor: object
    settings: TrainingSettings


def train_adapter(
    model, backbone: Backbone, train: ImageSet, seed: int, trains_image_tower: bool, preset: str | None
) -> None:
    """Trains what is trainable in the model.

    Args:
        model: the backbone's, with an adapter in it.
        backbone: with the settings.
        train: the images.
        seed: of their order.
        trains_image_tower: whether it has to be run in every step.
        preset: the published method, if it is one: some need more than a loss.
    """
    image_processor, device = backbone.image_processor, backbone.model.device.type
    dataset = train.pixels(image_processor) if trains_image_tower else train.embedded(backbone.model, image_processor)
    recipe = _recipe(model, backbone.settings, train, preset, use_cpu=device == "cpu")
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            seed=seed,
            dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **recipe.arguments,
        )
        trainer = recipe.trainer_class(
            model, args, train_dataset=dataset, optimizers=recipe.optimizers, callbacks=recipe.callbacks
        )
        trainer.remove_callback(PrinterCallback)  # there is a progress bar of all runs already
        trainer.train()


def _recipe(model, settings: TrainingSettings, train: ImageSet, preset: str | None, use_cpu: bool) -> Recipe:
    is_lora = isinstance(model.active_peft_config, LoraConfig)
    common = {
        "num_train_epochs": settings.num_train_epochs,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lora_learning_rate if is_lora else settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dataloader_drop_last": False,
    }
    if preset is None:
        return Recipe({**common, "use_cpu": use_cpu}, (None, None))
    shots = max(Counter(train.labels).values())
    if settings.paper_recipes:
        return training_recipe(preset, model, len(train.rows), shots, use_cpu=use_cpu)
    own = training_recipe(preset, model, len(train.rows), shots, use_cpu=use_cpu, **common)
    return replace(own, optimizers=(None, None))  # the Trainer's, as for all others
