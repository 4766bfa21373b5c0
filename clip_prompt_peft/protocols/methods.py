"""What is compared: one function each, from training images to a function that scores test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import BatchFeature, set_seed

from ..presets import PRESETS
from ..prompt_ensemble import load_templates, template_ensemble
from ..tuner import CLIPPromptTuningConfig
from .image_set import ImageSet
from .training import Backbone, train_adapter


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
