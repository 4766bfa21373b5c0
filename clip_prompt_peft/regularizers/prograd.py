"""ProGrad (prompt-aligned gradient), which removes the part of the gradient that opposes the zero-shot model."""

from __future__ import annotations

import torch

from .base import Prediction, Regularizer


class ProGradRegularizer(Regularizer):
    """
    Computes `-mean_b sum_c softmax(z0 / T) log_softmax(z / T) * T^2`, where z are the logits and z0 those of the
    teacher.

    The term is not added to the loss. Its gradient g_kl is the direction of general knowledge. Where the gradient g of
    the cross entropy opposes it (`<g, g_kl> < 0`), g becomes `g - projection * <g, u> u` with `u = g_kl / |g_kl|`. The
    training step of [`ProGradTrainer`] does this.

    Args:
        projection (`float`, *optional*, defaults to 1.0):
            The share of the opposing component that is removed, lambda in the paper.
        temperature (`float`, *optional*, defaults to 1.0):
            The temperature T.

    Raises:
        ValueError: If `temperature` is not positive.

    Source:
        Zhu et al., Prompt-aligned Gradient for Prompt Tuning (ICCV 2023). As in the authors' code, the entropy of the
        teacher is left out, which has no gradient.

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
    """Removes the component of `gradient` that opposes `general`. Both are treated as flat vectors.

    Args:
        gradient (`torch.Tensor`):
            The gradient of the cross entropy with respect to a parameter.
        general (`torch.Tensor`):
            The gradient of the general knowledge with respect to the same parameter.
        projection (`float`, *optional*, defaults to 1.0):
            The share of the opposing component that is removed.

    Returns:
        `torch.Tensor`: The new gradient, which equals `gradient` if the two do not oppose each other.
    """
    norm = general.norm()
    direction = general / norm
    opposing = (gradient * direction).sum().clamp(max=0)
    projected = gradient - projection * opposing * direction
    return torch.where(norm == 0, gradient, projected)  # an `if` would wait for the device
