"""The base class of regularizers and the predictions that they compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..text import normalize


@dataclass(frozen=True)
class Prediction:
    """
    The embeddings and logits that a classifier computes for a batch.

    Attributes:
        image_embeds (`torch.Tensor`):
            (B, E), L2-normalized.
        class_embeds (`torch.Tensor`):
            (C, E), or (B, C, E) if they depend on the image; L2-normalized.
        logits (`torch.Tensor`):
            (B, C).
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
        """Computes the logits from embeddings.

        Args:
            image_embeds (`torch.Tensor`):
                (B, E), normalized or not.
            class_embeds (`torch.Tensor`):
                (C, E) or (B, C, E), normalized.
            logit_scale (`torch.Tensor`):
                The logarithm of the factor by which similarities are multiplied.
            logit_bias (`torch.Tensor`, *optional*):
                A bias that is added to all logits, as in SigLIP.
        """
        with torch.autocast(class_embeds.device.type, enabled=False):  # bfloat16 rounds near 30 to 0.125
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
    The base class of loss terms that compare a model with its adapter (student) to the same model without (teacher).

    A subclass implements `forward` and takes its weights, all with defaults, as arguments of `__init__`.

    **Attributes**:
        - **teacher_templates** (`tuple[str, ...]`, *optional*) -- The templates over which the class embeddings of the
          teacher are averaged. By default, the template of the classifier is used.
        - **adds_to_loss** (`bool`) -- Whether the classifier adds the term to its loss. Otherwise, it only returns the
          term in `loss_terms`, for a training step that uses it in another way.
    """

    teacher_templates: tuple[str, ...] | None = None
    adds_to_loss: bool = True

    def forward(self, student: Prediction, teacher: Prediction) -> torch.Tensor:
        """Computes the term for a batch.

        Args:
            student (`Prediction`):
                The prediction with the adapter, with gradients.
            teacher (`Prediction`):
                The prediction without the adapter, without gradients.

        Returns:
            `torch.Tensor`: The weighted term, a scalar.
        """
        raise NotImplementedError
