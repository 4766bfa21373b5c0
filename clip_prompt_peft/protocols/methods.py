"""The methods that the protocols compare, and how they are trained."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from transformers import BatchFeature, PrinterCallback, TrainingArguments, set_seed

from ..assets import load_templates
from ..class_head import ClassHeadConfig
from ..evaluation.ensembles import template_ensemble
from ..modeling import PromptClassificationMixin
from ..peft_model import without_warning_of_renamed_property
from ..towers import eval_mode
from ..training.configs import PEFT_METHODS, method_config, trains_image_tower
from ..training.heads import fit_class_head
from ..training.recipes import HEAD_SETTINGS, Recipe, training_recipe
from ..tuner import CLIPPromptTuningConfig
from ..tuner.presets import PRESETS
from .image_set import ImageSet


TEACHER_PRESET = "ivlp"  # the preset of the teacher that a distillation learns from
Score = Callable[[ImageSet], "np.ndarray | None"]  # (N, C) logits, or None if the method cannot predict the classes


@dataclass(frozen=True)
class TrainingSettings:
    """
    The settings shared by all adapters: AdamW, a cosine schedule and no augmentation.

    Published methods can be trained with their authors' recipes instead. The linear probe is fitted by scikit-learn.

    Attributes:
        num_train_epochs (`int`, *optional*, defaults to 50):
            The number of epochs.
        batch_size (`int`, *optional*, defaults to 32):
            The number of images per batch.
        learning_rate (`float`, *optional*, defaults to 2e-3):
            The learning rate of prompts.
        lora_learning_rate (`float`, *optional*, defaults to 1e-3):
            The learning rate of CLIP-LoRA.
        paper_recipes (`bool`, *optional*, defaults to `False`):
            Whether to train published methods with the optimizer, epochs etc. of [`training_recipe`].
        linear_probe_c (`float`, *optional*, defaults to 0.316):
            The inverse regularization strength of the linear probe. The default is CLIP's
            (https://arxiv.org/abs/2103.00020, A.3).
        prompt_template (`str`, *optional*, defaults to `"a photo of a {}."`):
            The template of the zero-shot model, from which prompts are initialized.
        ensemble (`str`, *optional*, defaults to `"imagenet"`):
            The name of the templates of the ensemble, see [`load_templates`].
        when_fewer (`str`, *optional*, defaults to `"error"`):
            What to do about classes with fewer images than shots, see [`sample_few_shot`].
    """

    num_train_epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 2e-3
    lora_learning_rate: float = 1e-3
    paper_recipes: bool = False
    linear_probe_c: float = 0.316
    prompt_template: str = "a photo of a {}."
    ensemble: str = "imagenet"
    when_fewer: str = "error"

    def fingerprint(self, model: str) -> str:
        """Returns a hash of the settings and the model's name, which keeps the results of different ones apart."""
        text = json.dumps({"model": model, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Backbone:
    """
    The CLIP, or model of another family, that all methods start from.

    Attributes:
        model (`PromptClassificationMixin`):
            A classifier of any family without adapters. Methods that add an adapter remove it again.
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        settings (`TrainingSettings`):
            The training settings.
    """

    model: PromptClassificationMixin
    image_processor: object
    settings: TrainingSettings


@dataclass(frozen=True)
class FittedMethod:
    """
    A method that is ready to classify images.

    Attributes:
        score (`Callable[[ImageSet], np.ndarray]`):
            Returns the (N, C) logits of images, or `None` if the method cannot predict their classes.
        num_trainable (`int`, *optional*, defaults to 0):
            The number of trained parameters.
        num_bytes (`int`, *optional*, defaults to 0):
            The size of the saved adapter in bytes, 0 if there is none.
    """

    score: Score
    num_trainable: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Method:
    """
    A method of the benchmark.

    Attributes:
        fit (`Callable[[Backbone, ImageSet, int], AbstractContextManager[FittedMethod]]`):
            Takes the backbone, the training images and the seed, and returns a context manager that yields the fitted
            method and leaves the backbone unchanged on exit.
        is_trained (`bool`, *optional*, defaults to `True`):
            Whether the method uses training images, and not only their class names.
    """

    fit: Callable[[Backbone, ImageSet, int], AbstractContextManager[FittedMethod]]
    is_trained: bool = True


def find_method(name: str) -> Method:
    """Returns the method with a name from `METHODS`, `PEFT_METHODS` or [`~clip_prompt_peft.PRESETS`].

    Raises:
        ValueError: If the name is unknown.
    """
    if name in METHODS:
        return METHODS[name]
    if name in (*PEFT_METHODS, *PRESETS):
        return Method(partial(_published, name))
    raise ValueError(f"There is no method {name!r}; there are {', '.join([*METHODS, *PEFT_METHODS, *PRESETS])}.")


@contextmanager
def _zero_shot(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[FittedMethod]:
    def score(images: ImageSet) -> np.ndarray:
        backbone.model.set_class_names(images.class_names)
        return _logits(backbone, backbone.model, images)

    yield FittedMethod(score)


@contextmanager
def _ensemble(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[FittedMethod]:
    templates = load_templates(backbone.settings.ensemble)

    def score(images: ImageSet) -> np.ndarray:
        backbone.model.set_class_names(images.class_names)
        backbone.model.set_class_embeds(template_ensemble(backbone.model, templates))
        logits = _logits(backbone, backbone.model, images)
        backbone.model.set_class_embeds(None)
        return logits

    yield FittedMethod(score)


@contextmanager
def _linear_probe(backbone: Backbone, train: ImageSet, seed: int) -> Iterator[FittedMethod]:
    """Logistic regression on normalized image embeddings, which can predict only the classes it was trained on."""
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

    yield FittedMethod(score, num_trainable=probe.coef_.size + probe.intercept_.size)


def _prompt_tuning(backbone: Backbone, train: ImageSet, seed: int) -> AbstractContextManager[FittedMethod]:
    return _adapter(backbone, train, seed, CLIPPromptTuningConfig())


def _published(name: str, backbone: Backbone, train: ImageSet, seed: int) -> AbstractContextManager[FittedMethod]:
    return _adapter(backbone, train, seed, method_config(name, backbone.model), name)


@contextmanager
def _distilled(all_classes: bool, backbone: Backbone, train: ImageSet, seed: int) -> Iterator[FittedMethod]:
    """
    PromptKD. Its teacher is the backbone with prompts in both towers (`ivlp`), tuned on the labeled training images.

    The student sees the images of the pool without labels: those of all classes (transductive, as published), or only
    of the classes in `train` (inductive). Then the teacher gives it embeddings of new classes after its training.
    """
    of_teacher = replace(backbone, model=copy.deepcopy(backbone.model))
    of_prompts = method_config(TEACHER_PRESET, of_teacher.model)
    with _tuned(of_teacher, train, seed, of_prompts, TEACHER_PRESET) as (teacher, _):
        images = train.pool.classes() if all_classes else train.whole_classes()
        teacher.set_class_names(images.class_names)
        config = method_config("promptkd", backbone.model, projection_dim=teacher.get_base_model().embed_width)
        with _tuned(backbone, images, seed, config, "promptkd", teacher) as (model, num_trainable):

            def score(images: ImageSet) -> np.ndarray:
                known = model.active_peft_config.teacher_class_names
                new = [name for name in images.class_names if name not in known]
                if new:
                    teacher.set_class_names(new)
                    model.set_teacher_class_embeds(teacher.get_class_embeds().detach(), new)
                model.set_class_names(images.class_names)
                return _logits(backbone, model, images, from_pixels=True)

            yield FittedMethod(score, num_trainable, _num_bytes(model))


METHODS: dict[str, Method] = {
    "zero-shot": Method(_zero_shot, is_trained=False),
    "ensemble": Method(_ensemble, is_trained=False),
    "linear-probe": Method(_linear_probe),
    "prompt-tuning": Method(_prompt_tuning),
    "promptkd": Method(partial(_distilled, False)),
    "promptkd-transductive": Method(partial(_distilled, True)),
}


@contextmanager
def _adapter(
    backbone: Backbone,
    train: ImageSet,
    seed: int,
    config: PeftConfig,
    name: str | None = None,
) -> Iterator[FittedMethod]:
    """Trains any peft adapter with the `Trainer`."""
    with _tuned(backbone, train, seed, config, name) as (model, num_trainable):

        def score(images: ImageSet) -> np.ndarray | None:
            if getattr(config, "class_specific", False) and images.class_names != train.class_names:
                return None
            model.set_class_names(images.class_names)
            return _logits(backbone, model, images, trains_image_tower(config))

        yield FittedMethod(score, num_trainable, _num_bytes(model))


def _num_bytes(model: PeftModel) -> int:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return len(save(tensors, metadata={"format": "pt"}))  # as in the file that save_pretrained writes


@contextmanager
def _tuned(
    backbone: Backbone,
    train: ImageSet,
    seed: int,
    config: PeftConfig,
    name: str | None = None,
    teacher: PeftModel | None = None,
) -> Iterator[tuple[PeftModel, int]]:
    """Trains an adapter, yields the model and the number of trained parameters, and takes the adapter out again."""
    backbone.model.set_class_names(train.class_names)
    modes = [(module, module.training) for module in backbone.model.modules()]
    set_seed(seed)
    with without_warning_of_renamed_property():  # peft's own model, if the method is peft's
        model = get_peft_model(backbone.model, config)
    try:
        if isinstance(config, ClassHeadConfig) and not trains_image_tower(config):
            fit_class_head(model, _dataset(backbone, train, from_pixels=False))
        num_trainable = model.get_nb_trainable_parameters()[0]  # before the second of two stages freezes some
        train_adapter(model, backbone, train, seed, name, teacher)
        yield model, num_trainable
    finally:
        model.unload()
        for module, mode in modes:  # the Trainer has put all of them into training mode
            module.training = mode


def train_adapter(
    model, backbone: Backbone, train: ImageSet, seed: int, name: str | None, teacher: PeftModel | None = None
) -> None:
    """Trains the trainable parameters of a model.

    Args:
        model (`PeftModel`):
            The backbone's model with an adapter.
        backbone (`Backbone`):
            The image processor and the training settings.
        train (`ImageSet`):
            The training images.
        seed (`int`):
            The seed of the order of the images.
        name (`str`, *optional*):
            The published method of the adapter, some of which need their own trainer or callbacks.
        teacher (`PeftModel`, *optional*):
            The teacher of a distillation, which takes the place of labels.
    """
    from_pixels, device = trains_image_tower(model.active_peft_config), backbone.model.device.type
    if teacher is None:
        dataset = _dataset(backbone, train, from_pixels)  # otherwise image embeddings are computed only once
    else:
        dataset = train.for_distillation(teacher, backbone.image_processor)
    recipe = _recipe(model, backbone.settings, train, name, use_cpu=device == "cpu")
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **recipe.arguments,
        )
        trainer = recipe.trainer_class(
            model,
            args,
            train_dataset=dataset,
            optimizers=recipe.optimizers,
            callbacks=recipe.callbacks,
            **({} if teacher is None else {"teacher": teacher}),
        )
        trainer.remove_callback(PrinterCallback)  # the benchmark shows one progress bar for all runs
        trainer.train()


def _recipe(model, settings: TrainingSettings, train: ImageSet, name: str | None, use_cpu: bool) -> Recipe:
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
    if name is None:
        return Recipe({**common, "use_cpu": use_cpu}, (None, None))
    shots = max(Counter(train.labels).values())
    if settings.paper_recipes or name in HEAD_SETTINGS:  # other settings would be other methods
        return training_recipe(name, model, len(train.rows), shots, use_cpu=use_cpu)
    if name == "2sfs":  # whose two stages have an optimizer and a schedule of their own
        return training_recipe(
            name, model, len(train.rows), shots, use_cpu=use_cpu, num_train_epochs=settings.num_train_epochs
        )
    own = training_recipe(name, model, len(train.rows), shots, use_cpu=use_cpu, **common)
    return replace(own, optimizers=(None, None))  # the Trainer's defaults, as for all other methods


def _dataset(backbone: Backbone, images: ImageSet, from_pixels: bool) -> Dataset:
    if from_pixels:
        return images.pixels(backbone.image_processor)
    return images.embedded(backbone.model, backbone.image_processor)


@torch.no_grad()
def _logits(backbone: Backbone, model, images: ImageSet, from_pixels: bool = False) -> np.ndarray:
    """Returns (N, C) logits, from pixels if an adapter changes the image tower, otherwise from cached embeddings."""
    logits = []
    with eval_mode(model):
        for batch in _dataset(backbone, images, from_pixels).iter(batch_size=64 if from_pixels else 256):
            inputs = BatchFeature({name: torch.stack(list(batch[name])) for name in batch if name != "labels"})
            logits.append(model(**inputs.to(model.device, model.dtype)).logits)
    return torch.cat(logits).float().cpu().numpy()
