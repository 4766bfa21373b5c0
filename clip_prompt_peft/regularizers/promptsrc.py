"""PromptSRC (self-regulating prompts), which keeps embeddings and logits close to those of the zero-shot model."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..assets import load_templates
from .base import Prediction, Regularizer


class PromptSRCRegularizer(Regularizer):
    """
    Adds `text * mean|t - t0| + image * mean|v - v0| + logits * KL(p0 || p) / (B C)` to the loss, where t and v are the
    normalized class and image embeddings and p the probabilities. Those of the teacher have the index 0.

    The class embeddings of the teacher are a mean over 60 templates. If adapters change the image tower (vision
    prompts, ...), each step runs it a second time without them.

    Args:
        text (`float`, *optional*, defaults to 25.0):
            The weight of the class embeddings.
        image (`float`, *optional*, defaults to 10.0):
            The weight of the image embeddings.
        logits (`float`, *optional*, defaults to 1.0):
            The weight of the divergence, which is divided by the number of logits instead of the batch size.

    Source:
        Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting (ICCV 2023). The
        defaults are the weights in the authors' code.

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
    """Returns the mean absolute difference of two tensors. `teacher` is broadcast to the shape of `student`."""
    return (student - teacher).abs().mean()


def mean_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns KL(teacher || student) of logits (B, C), summed and divided by their number."""
    summed = F.kl_div(student.log_softmax(dim=-1), teacher.log_softmax(dim=-1), reduction="sum", log_target=True)
    return summed / student.numel()
