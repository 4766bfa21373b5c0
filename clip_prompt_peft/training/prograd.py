"""The training step of ProGrad, which needs the gradients of two losses."""

from __future__ import annotations

import torch
from transformers import Trainer

from ..regularizers import project_gradient
from ..towers import trainable_parameters


class ProGradMixin:
    """
    Mixin for a `Trainer` that removes the component of the gradient that conflicts with the general knowledge.

    It takes effect while the active adapter of the classifier has `regularizer="prograd"`, see [`ProGradRegularizer`].
    Otherwise the `Trainer` works as usual. Each parameter is projected separately, after gradients have been averaged
    over all processes and accumulation steps, so the result is the one of a single large batch.
    """

    _general: list[torch.Tensor] | None = None  # gradients of the general knowledge, summed over accumulation steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training or self._regularizer() is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "ProGrad uses the gradient of the model's own cross entropy; leave out label_smoothing_factor and "
                "compute_loss_func."
            )
        outputs = model(**inputs, return_loss_terms=True)
        self._accumulate_general(outputs.loss_terms["prograd"].mean())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("ProGrad needs gradients that DeepSpeed and FSDP shard; use plain data parallelism.")
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._project()
        return loss

    def _regularizer(self):
        return self.accelerator.unwrap_model(self.model).active_regularizers.get("prograd")

    def _accumulate_general(self, term: torch.Tensor) -> None:
        # autograd.grad bypasses the hooks of DistributedDataParallel, which expect one backward pass per step. Only
        # the direction matters, so the factor of a gradient scaler is harmless, and it prevents underflow.
        if self.accelerator.scaler is not None:
            term = self.accelerator.scaler.scale(term)
        parameters = trainable_parameters([self.model])
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        if self._general is not None:
            gradients = [old + new for old, new in zip(self._general, gradients)]
        self._general = list(gradients)

    @torch.no_grad()
    def _project(self) -> None:
        regularizer = self._regularizer()
        general, self._general = self._general, None
        for parameter, direction in zip(trainable_parameters([self.model]), general or ()):
            if parameter.grad is not None:
                direction = self.accelerator.reduce(direction, reduction="mean")
                parameter.grad.copy_(project_gradient(parameter.grad, direction, regularizer.projection))


class ProGradTrainer(ProGradMixin, Trainer):
    """
    The `Trainer` of transformers with the training step of ProGrad, see [`ProGradMixin`].

    Example:

    ```py
    >>> model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset("prograd"))
    >>> trainer = ProGradTrainer(model=model, args=args, train_dataset=train_dataset)
    >>> trainer.train()
    ```
    """
