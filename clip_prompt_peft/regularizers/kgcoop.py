"""Knowledge-guided context optimization: class embeddings stay near those of the hand-written prompts."""

from __future__ import annotations

import torch

from .base import Prediction, Regularizer


class KgCoOpRegularizer(Regularizer):
    """
    `weight * (1 - mean_c cos(t_c, t0_c))`: t the class embeddings, t0 those of the zero-shot template.

    It looks at class embeddings only, so it costs nothing per image. To hold on to the image embeddings and the logits
    as well, use [`PromptSRCRegularizer`]; to hold on to the direction of the gradient instead, [`ProGradRegularizer`].

    Args:
        weight: 8 in the authors' scripts.

    Source: Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization (CVPR 2023).

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
