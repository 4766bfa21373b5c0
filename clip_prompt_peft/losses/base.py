"""What every loss term looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Prediction:
    """What a classifier makes of a batch.

    Attributes:
        image_embeds: (B, E), L2-normalised.
        class_embeds: (C, E), or (B, C, E) where they depend on the image; L2-normalised.
        logits: (B, C).
    """

    image_embeds: torch.Tensor
    class_embeds: torch.Tensor
    logits: torch.Tensor


class Regularizer(nn.Module):
    """
    A loss term that compares the prompted model (student) with the same model without its adapter (teacher).

    A subclass implements `forward` and takes its weights, all with defaults, as arguments of `__init__`.

    **Attributes**:
        - **teacher_templates** (`tuple[str, ...]`, *optional*): the teacher's class embeddings are the mean over these
          templates; `None` means the classifier's own template.
        - **adds_to_loss** (`bool`): whether the classifier adds the term to its loss. If not, the term is only handed
          out in `loss_terms`, and the training step has to make something of it.
    """

    teacher_templates: tuple[str, ...] | None = None
    adds_to_loss: bool = True

    def forward(self, student: Prediction, teacher: Prediction) -> torch.Tensor:
        """
        Args:
            student: differentiable.
            teacher: without gradient.

        Returns:
            The weighted term, a scalar.
        """
        raise NotImplementedError
