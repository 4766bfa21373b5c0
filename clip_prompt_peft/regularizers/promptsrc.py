"""Self-regulating prompts: embeddings and logits stay near those of the model without prompts."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..assets import load_templates
from .base import Prediction, Regularizer


class PromptSRCRegularizer(Regularizer):
    """
    `text * mean|t - t0| + image * mean|v - v0| + logits * KL(p0 || p) / (B C)`: t, v the normalised class and image
    embeddings, p the probabilities; 0 marks the teacher's.

    The teacher's class embeddings are a mean over 60 templates. With vision prompts, or anything else that changes the
    image tower, each step runs that tower a second time without them.

    Args:
        text: weight of the class embeddings.
        image: weight of the image embeddings.
        logits: weight of the divergence. The sum is divided by the number of logits, not by the batch size.

    Source: Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting (ICCV 2023);
    the weights are those of the authors' code.

    Example:

    ```py
    >>> CLIPPromptTuningConfig.from_preset("promptsrc", regularizer_weights={"image": 5.0})
    ```
    """

    teacher_templates = tuple(load_templates("promptsrc"))

    def __init__(self, text: float = 25.0, image: float = 10.0, logits: float = 1.0) -> None:
        super().__init__()
        self.text, self.image, self.logits = text, image, logits

    def forward(self, student: Prediction, teacher: Prediction) -> torch.Tensor:
        return (
            self.text * mean_distance(student.class_embeds, teacher.class_embeds)
            + self.image * mean_distance(student.image_embeds, teacher.image_embeds)
            + self.logits * mean_divergence(student.logits, teacher.logits)
        )


def mean_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over all entries; `teacher` is broadcast to the student's shape."""
    return (student - teacher).abs().mean()


def mean_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of the probabilities, summed and divided by the number of logits.

    Args:
        student, teacher: (B, C) logits.
    """
    summed = F.kl_div(student.log_softmax(dim=-1), teacher.log_softmax(dim=-1), reduction="sum", log_target=True)
    return summed / student.numel()
