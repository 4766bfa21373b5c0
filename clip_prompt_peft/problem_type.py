"""One label per image or several, each class for itself or against the others: what labels look like, and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss(ignore_index)
SOFTMAX, SIGMOID = "softmax", "sigmoid"
MULTI_LABEL = "multi_label_classification"  # as transformers calls it in config.problem_type
PROBLEM_TYPES = ("single_label_classification", MULTI_LABEL)


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
