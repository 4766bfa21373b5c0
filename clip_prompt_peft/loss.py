"""Labels and losses of a classifier: cross entropy, and in training the active regularizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from .regularizers import Prediction, Regularizer
from .tuner.config import MULTI_LABEL


IGNORED_LABEL = -100  # the default ignore_index of torch.nn.CrossEntropyLoss
SOFTMAX, SIGMOID = "softmax", "sigmoid"


@dataclass
class PromptClassifierOutput(ImageClassifierOutput):
    """
    `ImageClassifierOutput` with the terms of the loss.

    Args:
        loss_terms (`dict[str, torch.Tensor]`, *optional*):
            The term `"cross_entropy"` and that of each regularizer by name, returned with `return_loss_terms=True`.
    """

    loss_terms: dict[str, torch.Tensor] | None = None


def check_labels(labels: torch.Tensor, class_names: Sequence[str], problem_type: str | None) -> None:
    """Checks that labels are (B,) class indices, whole numbers of any type, or (B, C) zeros and ones if multi-label.

    Raises:
        TypeError: If labels are no tensor.
        ValueError: If their shape or values are wrong.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor, got a {type(labels).__name__}; use torch.as_tensor(labels).")
    num_classes, shown = len(class_names), ", ".join(class_names[:5])
    if problem_type == MULTI_LABEL:
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                f"With problem_type={MULTI_LABEL!r} labels are (B, {num_classes}) zeros and ones, one for each class "
                f"({shown}, ...), got the shape {tuple(labels.shape)}."
            )
        return
    if labels.ndim != 1:
        raise ValueError(
            f"labels must be (B,), the index of one class for each image, got the shape {tuple(labels.shape)}. Zeros "
            "and ones for each class become indices with labels.argmax(dim=-1); for images with several classes set "
            f"config.problem_type = {MULTI_LABEL!r}."
        )
    if labels.is_floating_point() and (labels != labels.round()).any():  # also true for NaN
        bad = labels[labels != labels.round()]
        raise ValueError(
            f"labels must be class indices, got {float(bad[0])}"
            + (", which stands for a missing label; leave out such images." if bad[0].isnan() else ".")
        )
    labels = labels.long()  # a small type may not hold the numbers that they are compared with
    bad = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_classes)]
    if bad.numel():
        raise ValueError(
            f"Label {int(bad[0])} is out of range: the model has {num_classes} classes, so labels go from 0 to "
            f"{num_classes - 1}. Compare the data set's label names with the model's class_names ({shown}, ...)."
        )


def check_regularizers(
    regularizers: Mapping[str, Regularizer], labels: torch.Tensor | None, return_loss_terms: bool
) -> None:
    """Raises `ValueError` if a training step on these inputs would ignore one of the regularizers."""
    if regularizers and labels is None:
        raise ValueError(
            f"The loss terms {sorted(regularizers)} are added to the loss where the labels are, but forward got none; "
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
    if kind == SIGMOID:
        kept = labels != IGNORED_LABEL
        targets = F.one_hot(labels[kept], logits.shape[1]).to(logits.dtype)  # (B, C)
        return F.binary_cross_entropy_with_logits(logits[kept], targets, reduction="sum") / kept.sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)


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
    return loss, terms
