"""How the methods are trained."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import BatchFeature, PrinterCallback, TrainingArguments, set_seed

from ..assets import load_templates
from ..evaluation.ensembles import template_ensemble
from ..families import CLIPForPromptClassification
from ..training.recipes import Recipe, training_recipe
from ..tuner import CLIPPromptTuningConfig
from ..tuner.presets import PRESETS
from .image_set import ImageSet


@dataclass(frozen=True)
class TrainingSettings:
    """
    How all adapters are trained, so that they can be compared: AdamW with a cosine schedule, and no augmentation.

    The linear probe is fitted by scikit-learn instead, and presets can be trained as their papers do.

    Attributes:
        num_train_epochs: rounds over the drawn images.
        batch_size: images in a step.
        learning_rate: of prompts.
        lora_learning_rate: of LoRA.
        paper_recipes: train presets with the optimizer, the epochs and so on of [`training_recipe`].
        lora_rank: of LoRA in the query, key and value of both towers.
        linear_probe_c: scikit-learn's inverse strength of the linear probe's penalty; 0.316 is CLIP's
            (https://arxiv.org/abs/2103.00020, A.3).
        prompt_template: of zero-shot, and of the prompts to start from.
        ensemble: name of the templates of the ensemble, see [`load_templates`].
        when_fewer: about classes with fewer images than shots, see [`sample_few_shot`].
    """

    num_train_epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 2e-3
    lora_learning_rate: float = 1e-3
    paper_recipes: bool = False
    lora_rank: int = 2
    linear_probe_c: float = 0.316
    prompt_template: str = "a photo of a {}."
    ensemble: str = "imagenet"
    when_fewer: str = "error"

    def fingerprint(self, model: str) -> str:
        """Of all settings and the model's name: results under another one are not mixed with these."""
        text = json.dumps({"model": model, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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


Score = Callable[[ImageSet], "np.ndarray | None"]  # (N, C) logits; None if the method cannot know the classes


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        fit: context manager from backbone, training images and seed to a function that scores images; on leaving it
            the backbone is as it was.
        is_trained: whether it looks at training images at all, or only at their class names.
    """

    fit: Callable[[Backbone, ImageSet, int], object]
    is_trained: bool = True


def find_method(name: str) -> Method:
    """By its name: one of `METHODS`, or one of the published methods of [`~clip_prompt_peft.PRESETS`].

    Raises:
        ValueError: unknown name.
    """
    if name in METHODS:
        return METHODS[name]
    if name in PRESETS:
        return Method(partial(_preset, name))
    raise ValueError(f"There is no method {name!r}; there are {', '.join([*METHODS, *PRESETS])}.")


@contextmanager
def _zero_shot(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[Score]:
    def score(images: ImageSet) -> np.ndarray:
        backbone.model.set_class_names(images.class_names)
        return _logits_of_embeds(backbone, backbone.model, images)

    yield score


@contextmanager
def _ensemble(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[Score]:
    templates = load_templates(backbone.settings.ensemble)

    def score(images: ImageSet) -> np.ndarray:
        backbone.model.set_class_names(images.class_names)
        backbone.model.set_class_embeds(template_ensemble(backbone.model, templates))
        logits = _logits_of_embeds(backbone, backbone.model, images)
        backbone.model.set_class_embeds(None)
        return logits

    yield score


@contextmanager
def _linear_probe(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[Score]:
    """Logistic regression on normalised image embeddings; it knows the classes of its training only."""
    from sklearn.linear_model import LogisticRegression

    def embeds(images: ImageSet) -> np.ndarray:
        return torch.nn.functional.normalize(images.embeds(backbone.model, backbone.image_processor)).numpy()

    probe = LogisticRegression(C=backbone.settings.linear_probe_c, max_iter=1000, random_state=seed)
    probe.fit(embeds(train), train.labels)

    def score(images: ImageSet) -> np.ndarray | None:
        if not set(images.class_names) <= set(train.class_names):
            return None
        columns = [train.class_names.index(name) for name in images.class_names]
        return probe.predict_log_proba(embeds(images))[:, columns]

    yield score


def _lora(backbone: Backbone, train: ImageSet, seed: int):
    rank = backbone.settings.lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj"])
    return _tuned(backbone, train, seed, config, trains_image_tower=True)


def _prompt_tuning(backbone: Backbone, train: ImageSet, seed: int):
    return _tuned(backbone, train, seed, CLIPPromptTuningConfig())


def _preset(name: str, backbone: Backbone, train: ImageSet, seed: int):
    config = CLIPPromptTuningConfig.from_preset(name, model=backbone.model)
    return _tuned(backbone, train, seed, config, bool(config.num_vision_virtual_tokens), name)


METHODS: dict[str, Method] = {
    "zero-shot": Method(_zero_shot, is_trained=False),
    "ensemble": Method(_ensemble, is_trained=False),
    "linear-probe": Method(_linear_probe),
    "lora": Method(_lora),
    "prompt-tuning": Method(_prompt_tuning),
}


@contextmanager
def _tuned(
    backbone: Backbone,
    train: ImageSet,
    seed: int,
    config: PeftConfig,
    trains_image_tower: bool = False,
    preset: str | None = None,
) -> Iterator[Score]:
    """Any adapter of peft, trained by the Trainer."""
    backbone.model.set_class_names(train.class_names)
    set_seed(seed)
    model = get_peft_model(backbone.model, config)
    try:
        train_adapter(model, backbone, train, seed, trains_image_tower, preset)

        def score(images: ImageSet) -> np.ndarray | None:
            if getattr(config, "class_specific", False) and images.class_names != train.class_names:
                return None
            model.set_class_names(images.class_names)
            if trains_image_tower:
                return _logits_of_pixels(backbone, model, images)
            return _logits_of_embeds(backbone, model, images)

        yield score
    finally:
        model.unload()


@torch.no_grad()
def _logits_of_embeds(backbone: Backbone, model, images: ImageSet) -> np.ndarray:
    """(N, C), with the image tower as it is."""
    model.eval()
    embeds = images.embeds(backbone.model, backbone.image_processor)  # (N, E)
    logits = [model(image_embeds=part.to(model.device)).logits for part in embeds.split(256)]
    return torch.cat(logits).float().cpu().numpy()


@torch.no_grad()
def _logits_of_pixels(backbone: Backbone, model, images: ImageSet) -> np.ndarray:
    """(N, C), with whatever was put into the image tower."""
    model.eval()
    logits = []
    for batch in images.pixels(backbone.image_processor).iter(batch_size=64):
        inputs = BatchFeature({name: torch.stack(list(batch[name])) for name in batch if name != "labels"})
        logits.append(model(**inputs.to(model.device, model.dtype)).logits)
    return torch.cat(logits).float().cpu().numpy()
