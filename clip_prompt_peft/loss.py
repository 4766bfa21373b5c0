"""Losses of a classifier: cross entropy, and in training the active regularizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from .labels import IGNORED_LABEL
from .regularizers import Prediction, Regularizer
from .tuner.base_config import MULTI_LABEL
from .tuner.layout import PromptLayout


SOFTMAX, SIGMOID = "softmax", "sigmoid"
TEACHER = "teacher_"  # in a batch for distillation, in front of the names of the teacher's inputs, and of its logits
TEACHER_LOGITS = f"{TEACHER}logits"


@dataclass
class PromptClassifierOutput(ImageClassifierOutput):
    """
    `ImageClassifierOutput` with the terms of the loss.

    Args:
        loss_terms (`dict[str, torch.Tensor]`, *optional*):
            The term `"cross_entropy"` and that of each regularizer by name, returned with `return_loss_terms=True`.
    """

    loss_terms: dict[str, torch.Tensor] | None = None


def check_regularizers(
    regularizers: Mapping[str, Regularizer],
    names: Sequence[str],
    labels: torch.Tensor | None,
    return_loss_terms: bool,
    layout: PromptLayout | None = None,
) -> None:
    """Raises `ValueError` if a step would ignore a regularizer, or another of named terms, or cannot compute it."""
    if regularizers and layout is not None and layout.projection_dim is not None:
        raise ValueError(
            f"The loss terms {sorted(regularizers)} compare with the zero-shot model, but the active adapter has "
            f"class embeddings of a teacher, of the width projection_dim={layout.projection_dim}; take them out of "
            "model.regularizers."
        )
    if names and labels is None:
        raise ValueError(
            f"The loss terms {sorted(names)} are added to the loss where the labels are, but forward got none; "
            "leave out label_smoothing_factor and compute_loss_func, which keep them from the model, or evaluate with "
            "model.eval()."
        )
    separate = [name for name, regularizer in regularizers.items() if not regularizer.adds_to_loss]
    if separate and not return_loss_terms:
        raise ValueError(
            f"{separate[0]!r} is not a term of the loss but changes its gradient, which the stock Trainer does not "
            "know how to do; train with ProGradTrainer, or call forward with return_loss_terms=True."
        )


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None, kind: str = SOFTMAX
) -> torch.Tensor:
    """Returns the mean loss over the batch, chosen by `config.problem_type` as in transformers' classifiers.

    Images with the ignored label -100 are left out. If it is the label of all of them, the loss is 0, and not NaN,
    which an optimizer step would write into the vectors.

    Args:
        logits (`torch.Tensor`):
            (B, C).
        labels (`torch.Tensor`):
            (B,) class indices, or (B, C) zeros and ones if multi-label.
        problem_type (`str`, *optional*):
            With `"multi_label_classification"`, the loss is the binary cross entropy of each class, otherwise the
            cross entropy.
        kind (`str`, *optional*, defaults to `"softmax"`):
            With `"sigmoid"` and one label per image, the loss is that of SigLIP: whether each class is the label,
            summed over the classes. A bias of the logits matters here, while cross entropy does not depend on it.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in (SOFTMAX, SIGMOID):
        raise ValueError(f"config.classification_loss must be {SOFTMAX!r} or {SIGMOID!r}, got {kind!r}.")
    if problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    labels = labels.long()  # data sets also hold them as int8, float, ...
    kept = labels != IGNORED_LABEL
    num_kept = kept.sum().clamp(min=1)
    if kind == SIGMOID:
        # Ignored rows are written over instead of taken out, since only the device knows how many there are.
        logits = logits.masked_fill(~kept[:, None], torch.finfo(logits.dtype).min)  # their loss is exactly 0
        targets = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)  # (B, C)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / num_kept
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum") / num_kept


def compute_loss(
    model,
    prediction: Prediction,
    labels: torch.LongTensor,
    image_inputs: dict,
    regularizers: Mapping[str, Regularizer],
    template: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss, and its terms by name.

    Args:
        model (`PromptClassificationMixin`):
            The classifier.
        prediction (`Prediction`):
            Its prediction.
        labels (`torch.LongTensor`):
            (B,), or (B, C) if multi-label.
        image_inputs (`dict`):
            The inputs of the image tower.
        regularizers (`Mapping[str, Regularizer]`):
            The regularizers in effect, by name.
        template (`str`):
            The template of the teacher, if a regularizer has none of its own.
    """
    kind = getattr(model.config, "classification_loss", SOFTMAX)
    loss = classification_loss(prediction.logits, labels, model.config.problem_type, kind)
    terms = {"cross_entropy": loss}
    for name, regularizer in regularizers.items():
        teacher = model.teacher.predict(model, regularizer.teacher_templates or (template,), prediction, image_inputs)
        terms[name] = regularizer(prediction, teacher)
        if regularizer.adds_to_loss:
            loss = loss + terms[name]
    of_head = model.class_head.loss_terms() if model.training else {}
    return sum(of_head.values(), loss), {**terms, **of_head}
