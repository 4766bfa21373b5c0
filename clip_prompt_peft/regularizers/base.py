"""What every loss term looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..text import normalize


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

    @classmethod
    def of(
        cls,
        image_embeds: torch.Tensor,
        class_embeds: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
    ) -> Prediction:
        """
        Args:
            image_embeds: (B, E), normalised or not.
            class_embeds: (C, E) or (B, C, E), normalised.
            logit_scale: logarithm of the factor.
            logit_bias: added to all logits, if there is one (SigLIP).
        """
        with torch.autocast(class_embeds.device.type, enabled=False):  # bfloat16 would round a logit of 30 to 0.1
            image_embeds = normalize(image_embeds.to(class_embeds.dtype))
            if class_embeds.ndim == 2:
                similarity = image_embeds @ class_embeds.T  # (B, C)
            else:
                similarity = (class_embeds @ image_embeds[:, :, None]).squeeze(-1)  # (B, C)
            logits = logit_scale.exp().to(similarity.dtype) * similarity
            if logit_bias is not None:
                logits = logits + logit_bias.to(similarity.dtype)
            return cls(image_embeds, class_embeds, logits)


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
