"""Prompt-aligned gradient: no step that works against what the zero-shot model knows."""

from __future__ import annotations

import torch

from .base import Prediction, Regularizer


class ProGradRegularizer(Regularizer):
    """
    The direction of general knowledge: `-mean_b sum_c softmax(z0 / T) log_softmax(z / T) * T^2`, z the logits.

    It is not added to the loss. Where the gradient of the cross entropy, g, points away from the gradient of this
    term, g_kl, the component along g_kl is taken out of g: `g - projection * <g, u> u` with `u = g_kl / |g_kl|`. That
    takes a training step of its own, [`ProGradTrainer`].

    Args:
        projection: how much of the component is taken out, lambda in the paper.
        temperature: T.

    Source: Zhu et al., Prompt-aligned Gradient for Prompt Tuning (ICCV 2023); as in the authors' code, the
    divergence leaves out the teacher's entropy, which has no gradient.

    Example:

    ```py
    >>> config = CLIPPromptTuningConfig(num_virtual_tokens=16, regularizer="prograd")
    >>> trainer = ProGradTrainer(model=get_peft_model(classifier, config), args=args, train_dataset=train_dataset)
    ```
    """

    adds_to_loss = False

    def __init__(self, projection: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        self.projection = projection
        self.temperature = temperature

    def forward(self, student: Prediction, teacher: Prediction) -> torch.Tensor:
        wanted = (teacher.logits / self.temperature).softmax(dim=-1)  # (B, C)
        log_probs = (student.logits / self.temperature).log_softmax(dim=-1)  # (B, C)
        return -(wanted * log_probs).sum(dim=-1).mean() * self.temperature**2


def project_gradient(gradient: torch.Tensor, general: torch.Tensor, projection: float = 1.0) -> torch.Tensor:
    """Takes out of `gradient` what works against `general`, both of the same parameter, compared as flat vectors.

    Args:
        gradient: of the cross entropy.
        general: of the general knowledge.
        projection: 1 removes the opposing component, less removes that share of it.

    Returns:
        A tensor of the same shape; `gradient` itself where the two do not oppose each other.
    """
    norm = general.norm()
    if norm == 0:
        return gradient
    direction = general / norm
    opposing = (gradient * direction).sum().clamp(max=0)
    return gradient - projection * opposing * direction
