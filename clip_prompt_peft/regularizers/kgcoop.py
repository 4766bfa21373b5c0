"""KgCoOp (knowledge-guided context optimization), which keeps class embeddings close to those of the template."""

from __future__ import annotations

import torch

from .base import Prediction, Regularizer


class KgCoOpRegularizer(Regularizer):
    """
    Adds `weight * (1 - mean_c cos(t_c, t0_c))` to the loss, where t are the class embeddings and t0 those of the
    teacher.

    It uses only class embeddings, so its cost does not depend on the number of images. [`PromptSRCRegularizer`] also
    regularizes image embeddings and logits, [`ProGradRegularizer`] the direction of the gradient instead.

    Args:
        weight (`float`, *optional*, defaults to 8.0):
            The weight of the term, by default that of the authors' scripts.

    Source:
        Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization (CVPR 2023).

    Example:

    ```py
    >>> CLIPPromptTuningConfig(num_virtual_tokens=4, regularizer="kgcoop", regularizer_weights={"weight": 8.0})
    ```
    """

    def __init__(self, weight: float = 8.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Prediction, teacher: Prediction) -> torch.Tensor:
        cosines = (student.class_embeds * teacher.class_embeds).sum(dim=-1)  # (C,) or (B, C)
        return self.weight * (1.0 - cosines.mean())
