"""What class heads need before and during a training: what they read off the training images, and two stages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..class_head import ClassHeadModel
from ..class_head.config import CACHE


EMBEDS, LABELS = "image_embeds", "labels"
# The number of random crops of each image that the authors take embeddings of.
NUM_VIEWS = {"clap": 20, "zs-lp": 20, "tip-adapter": 10, "tip-adapter-f": 10}


def fit_class_head(model: PeftModel, train_dataset) -> None:
    """
    Reads off the training images what a class head needs of them before its first step.

    For `pull` these are the weights of the classes, for a cache its keys. Other heads need nothing. Without training,
    as in Tip-Adapter, this is all there is to do.

    Args:
        model (`PeftModel`):
            A classifier with an adapter of a [`ClassHeadConfig`]. What was read before is replaced.
        train_dataset (`Dataset` or `Mapping`):
            The result of [`~data.cache_image_embeds`], with several views of each image or one, or tensors: N
            `image_embeds` (N, E) or (N, K, E), and `labels` (N,).

    Raises:
        TypeError: If the active adapter is no class head.
        ValueError: If the images do not fit the classes of the head, or a class has none.

    Example:

    ```py
    >>> model = get_peft_model(classifier, ClassHeadConfig.from_preset("tip-adapter"))
    >>> fit_class_head(model, cache_image_embeds(images["train"], classifier, image_processor))
    >>> model.save_pretrained("pets-tip")
    ```
    """
    tuner = _tuner_of(model)
    name = tuner.active_adapters[0]
    config = tuner.config_of(name)
    embeds, labels = _images_of(train_dataset)
    class_names = config.class_names
    if embeds.shape[-1] != config.embed_width:
        raise ValueError(f"image_embeds have {embeds.shape[-1]} values, but the model's have {config.embed_width}.")
    counts = _counts(labels, class_names)
    missing = [class_name for class_name, count in zip(class_names, counts) if count == 0]
    if missing and (config.pull or config.head_type == CACHE):
        raise ValueError(
            f"The head takes something of images of each class, but there are none of {len(missing)} of its "
            f"{len(class_names)} classes: {missing[:5]}. Train on the classes that there are images of."
        )
    tuner.fit_head(embeds, labels, name)


def _images_of(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embeddings (N, K, E) and labels (N,) of a data set."""
    columns = dataset if isinstance(dataset, Mapping) else getattr(dataset, "column_names", ())
    if EMBEDS not in columns or LABELS not in columns:
        raise ValueError(
            f"A class head reads {EMBEDS} and {LABELS} of the training images, got the columns {list(columns)}; make "
            "them with cache_image_embeds of clip_prompt_peft.data."
        )
    rows = dataset if isinstance(dataset, Mapping) else dataset.with_format("torch")[:]
    embeds, labels = torch.as_tensor(rows[EMBEDS]).float(), torch.as_tensor(rows[LABELS]).long()
    if embeds.ndim not in (2, 3) or labels.shape != embeds.shape[:1] or not len(labels):
        raise ValueError(
            f"{EMBEDS} must be (N, E), or (N, K, E) of K views, and {LABELS} (N,), got {tuple(embeds.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{EMBEDS} hold NaN or Inf.")
    return embeds if embeds.ndim == 3 else embeds[:, None], labels


def _counts(labels: torch.Tensor, class_names: list[str]) -> list[int]:
    wrong = [label for label in labels.unique().tolist() if not 0 <= label < len(class_names)]
    if wrong:
        raise ValueError(f"Label {wrong[0]} is no index of the {len(class_names)} classes of the head.")
    return labels.bincount(minlength=len(class_names)).tolist()


def start_class_head(model: PeftModel) -> None:
    """
    Ends the first stage of a head that `starts_later`: it starts from the text embeddings of the tuned model.

    Its LayerNorms are frozen from now on. [`TwoStageTuning`] calls it during a training.

    Args:
        model (`PeftModel`):
            A classifier with an adapter of a [`ClassHeadConfig`].

    Raises:
        TypeError: If the active adapter is no class head.

    Example:

    ```py
    >>> model = get_peft_model(classifier, ClassHeadConfig.from_preset("2sfs"))
    >>> trainer.train()  # LayerNorms
    >>> start_class_head(model)
    ```
    """
    tuner = _tuner_of(model)
    tuner.start_head()
    tuner.set_stage(tunes_layer_norms=False)


def _tuner_of(model: nn.Module) -> ClassHeadModel:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, ClassHeadModel):
        raise TypeError(
            "Expected a PeftModel with a class head; make one with get_peft_model(classifier, ClassHeadConfig(...)), "
            f"got a {type(model).__name__}."
        )
    return tuner


class TwoStageTuning(TrainerCallback):
    """
    Trains LayerNorms first, with class embeddings of the text tower, and then a class head that starts from these.

    What is trained changes after a step, so that one Trainer, with one optimizer and one schedule, does both stages,
    and a checkpoint of either can be continued. The recipe `"2sfs"` has it, with an optimizer whose two groups have
    schedules of their own. Adam keeps its state for each parameter, so each stage has what an optimizer of its own
    would have.

    Args:
        num_first_steps (`int`):
            The number of steps of the first stage.

    Source:
        Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages" (CVPR 2025).

    Example:

    ```py
    >>> model = get_peft_model(classifier, ClassHeadConfig.from_preset("2sfs"))
    >>> recipe = training_recipe("2sfs", model, num_examples=len(train_dataset), shots=16)
    >>> trainer = Trainer(
    ...     model, args, train_dataset=train_dataset, optimizers=recipe.optimizers, callbacks=recipe.callbacks
    ... )
    ```
    """

    def __init__(self, num_first_steps: int) -> None:
        if num_first_steps < 1:
            raise ValueError(f"num_first_steps must be 1 or more, got {num_first_steps!r}.")
        self.num_first_steps = num_first_steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError("TwoStageTuning excludes load_best_model_at_end, which would mix stages; leave it out.")
        tuner = _tuner_of(model)
        tuner.set_stage(tunes_layer_norms=state.global_step < self.num_first_steps)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.num_first_steps:
            start_class_head(model)
