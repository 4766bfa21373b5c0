"""The training step of ProGrad, which no loss can express: it needs two gradients."""

from __future__ import annotations

import torch
from transformers import Trainer

from ..regularizers import project_gradient


class ProGradMixin:
    """
    For a `Trainer`: takes out of the gradient of the cross entropy what works against general knowledge.

    Works with the classifier while its active adapter has `regularizer="prograd"`, see [`ProGradRegularizer`]; with
    any other it is the `Trainer` that it is mixed into. Each tensor is projected on its own, after the gradients of
    all processes and of all steps of an accumulation have been averaged, as if it were one batch on one device.
    """

    _general: list[torch.Tensor | None] | None = None  # gradients of general knowledge, summed over an accumulation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training or self._regularizer() is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "ProGrad compares the gradient of the model's own cross entropy; leave out label_smoothing_factor and "
                "compute_loss_func."
            )
        outputs = model(**inputs, return_loss_terms=True)
        self._accumulate_general(outputs.loss_terms["prograd"].mean())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "ProGrad compares gradients of whole tensors, which DeepSpeed and FSDP cut up; train with plain "
                "data parallelism."
            )
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._project()
        return loss

    def _regularizer(self):
        return self.accelerator.unwrap_model(self.model).active_regularizers.get("prograd")

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _accumulate_general(self, term: torch.Tensor) -> None:
        # autograd.grad goes past DistributedDataParallel's hooks, which expect one backward pass a step. The direction
        # is all that matters, so the factor of a gradient scaler does no harm and saves small values from vanishing.
        if self.accelerator.scaler is not None:
            term = self.accelerator.scaler.scale(term)
        gradients = torch.autograd.grad(term, self._trained(), retain_graph=True, allow_unused=True)
        so_far = self._general or [None] * len(gradients)
        self._general = [_sum(old, new) for old, new in zip(so_far, gradients)]

    @torch.no_grad()
    def _project(self) -> None:
        regularizer = self._regularizer()
        general, self._general = self._general, None
        for parameter, direction in zip(self._trained(), general or ()):
            if direction is not None and parameter.grad is not None:
                direction = self.accelerator.reduce(direction, reduction="mean")
                parameter.grad.copy_(project_gradient(parameter.grad, direction, regularizer.projection))


def _sum(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    return (new if old is None else old) if old is None or new is None else old + new


class ProGradTrainer(ProGradMixin, Trainer):
    """`transformers.Trainer` with the training step of ProGrad.

    Example:

    ```py
    >>> model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset("prograd"))
    >>> trainer = ProGradTrainer(model=model, args=args, train_dataset=train_dataset)
    >>> trainer.train()
    ```
    """
