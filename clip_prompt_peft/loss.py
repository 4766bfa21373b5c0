"""One label per image or several, each class for itself or against the others: what labels look like, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from .regularizers import Prediction, Regularizer, build_regularizer
from .tuner.config import MULTI_LABEL


IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss(ignore_index)


SOFTMAX, SIGMOID = "softmax", "sigmoid"


def check_labels(labels: torch.Tensor, class_names: Sequence[str], problem_type: str | None) -> None:
    """Raises `ValueError` unless the labels are (B,) indices of classes, or (B, C) zeros and ones if multi-label."""
    num_classes, shown = len(class_names), ", ".join(class_names[:5])
    if problem_type == MULTI_LABEL:
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                f"With problem_type={MULTI_LABEL!r} labels are (B, {num_classes}) zeros and ones, one for each class "
                f"({shown}, ...), got the shape {tuple(labels.shape)}."
            )
        return
    bad = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_classes)]
    if bad.numel():
        raise ValueError(
            f"Label {int(bad[0])} is out of range: the model has {num_classes} classes, so labels go from 0 to "
            f"{num_classes - 1}. Compare the data set's label names with the model's class_names ({shown}, ...)."
        )


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None, kind: str = SOFTMAX
) -> torch.Tensor:
    """Mean loss over the batch, as transformers' classifiers choose it by `config.problem_type`.

    Args:
        logits: (B, C)
        labels: (B,) class indices, or (B, C) zeros and ones if multi-label.
        problem_type: `"multi_label_classification"` is binary cross entropy of each class; otherwise cross entropy.
        kind: with one label, `"sigmoid"` is SigLIP's loss in place of cross entropy: whether each class is the label,
            summed over the classes. A bias that belongs to the logits counts here; cross entropy does not see it.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in (SOFTMAX, SIGMOID):
        raise ValueError(f"config.classification_loss must be {SOFTMAX!r} or {SIGMOID!r}, got {kind!r}.")
    if problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if kind == SIGMOID:
        kept = labels != IGNORED_LABEL
        targets = F.one_hot(labels[kept], logits.shape[1]).to(logits.dtype)  # (B, C)
        return F.binary_cross_entropy_with_logits(logits[kept], targets, reduction="sum") / kept.sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)


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
