"""The loss of a classifier: cross entropy, and in training the regularizers in effect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from .losses import Prediction, Regularizer, build_regularizer
from .problem_type import SOFTMAX, classification_loss


@dataclass
class PromptClassifierOutput(ImageClassifierOutput):
    """
    `ImageClassifierOutput` and, where asked for, what the loss is made of.

    Args:
        loss_terms (`dict[str, torch.Tensor]`, *optional*):
            `"cross_entropy"` and each regularizer by name; returned with `return_loss_terms`.
    """

    loss_terms: dict[str, torch.Tensor] | None = None


def active_regularizers(model) -> dict[str, Regularizer]:
    """The loss terms of a classifier that are in effect, by name: its own, and that of the active prompt adapter."""
    layout = model.prompt_layout
    if layout is None or layout.regularizer is None:
        return dict(model.regularizers)
    regularizer = build_regularizer(layout.regularizer, layout.regularizer_weights)
    if layout.teacher_templates:
        regularizer.teacher_templates = tuple(layout.teacher_templates)
    return {**model.regularizers, layout.regularizer: regularizer}


def check_training(model, labels, image_embeds, return_loss_terms: bool) -> None:
    """Raises `ValueError` if a training step on these inputs would not train what is asked for."""
    if image_embeds is not None and getattr(model.prompt_layout, "num_vision_virtual_tokens", 0):
        raise ValueError(
            "The active adapter has vision prompts, so image embeddings made in advance would leave these untrained; "
            "train with pixel_values."
        )
    regularizers = active_regularizers(model)
    if regularizers and labels is None:
        raise ValueError(
            f"The loss terms {sorted(regularizers)} are added to the loss where the labels are, but forward got none; "
            "leave out label_smoothing_factor and compute_loss_func, which keep them from the model, or evaluate with "
            "model.eval()."
        )
    apart = [name for name, regularizer in regularizers.items() if not regularizer.adds_to_loss]
    if apart and not return_loss_terms:
        raise ValueError(
            f"{apart[0]!r} is not a term of the loss but changes its gradient, which the stock Trainer does not know "
            "how to do; train with ProGradTrainer, or call forward with return_loss_terms=True."
        )


def compute_loss(
    model, prediction: Prediction, labels: torch.LongTensor, image_inputs: dict
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Args:
        model: the classifier; its regularizers count in training only.
        prediction: of it.
        labels: (B,), or (B, C) if several for each image.
        image_inputs: what the image embeddings were made from.

    Returns:
        The loss, and what it is made of by name.
    """
    kind = getattr(model.config, "classification_loss", SOFTMAX)
    loss = classification_loss(prediction.logits, labels, model.config.problem_type, kind)
    terms = {"cross_entropy": loss}
    zero_shot_template = getattr(model.prompt_layout, "prompt_template", None) or model.prompt_template
    for name, regularizer in active_regularizers(model).items() if model.training else ():
        templates = regularizer.teacher_templates or (zero_shot_template,)
        teacher = model.teacher.predict(model, templates, prediction, image_inputs)
        terms[name] = regularizer(prediction, teacher)
        if regularizer.adds_to_loss:
            loss = loss + terms[name]
    return loss, terms
