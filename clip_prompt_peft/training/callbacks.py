"""Callbacks for the Trainer: averaging of prompts over epochs (PromptSRC) and a stop at NaN or Inf."""

from __future__ import annotations

import base64

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class GaussianPromptAveraging(TrainerCallback, ExportableState):
    """
    Replaces the trained parameters with their Gaussian-weighted average over the epochs, at the end of training.

    The parameters at the end of epoch e = 1, 2, ... are weighted by a normal density at e. Only trainable parameters
    are averaged; the authors' code also multiplies the frozen weights, which rounds them. The sums are kept in float64
    and saved in the `trainer_state.json` of each checkpoint, so a resumed training ends with the same parameters as an
    uninterrupted one. If training stops early, the average is over the epochs completed so far.

    Args:
        mean (`float`):
            The epoch with the largest weight. The first epoch is 1.
        std (`float`):
            The standard deviation in epochs.

    Source:
        Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting" (ICCV 2023). The
        authors use (15, 1) of 20 epochs for base-to-new generalization, (6, 10) of 20 for cross-dataset evaluation,
        and (30, 30) or (45, 5) of 50 for few-shot learning.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[GaussianPromptAveraging(15, 1)])
    ```
    """

    def __init__(self, mean: float, std: float) -> None:
        if not std > 0:
            raise ValueError(f"std must be positive, got {std!r}.")
        self.mean, self.std = mean, std
        self._sums: dict[str, torch.Tensor] = {}
        self._total = 0.0

    def state(self) -> dict:
        """Returns the state that the Trainer saves with a checkpoint. All values can be written as JSON."""
        return {
            "args": {"mean": self.mean, "std": self.std},
            "attributes": {"encoded_sums": self.encoded_sums, "_total": self._total},
        }

    @property
    def encoded_sums(self) -> str:
        """The weighted sums as safetensors in base64."""
        return base64.b64encode(safetensors.torch.save(self._sums)).decode("ascii")

    @encoded_sums.setter
    def encoded_sums(self, encoded: str) -> None:
        self._sums = safetensors.torch.load(base64.b64decode(encoded))

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError("GaussianPromptAveraging excludes load_best_model_at_end; leave one of the two out.")
        self._sums, self._total = {}, 0.0
        # The Trainer restores callbacks only with restore_callback_states_from_checkpoint, and otherwise says nothing.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        epoch = round(state.epoch)
        weight = float(gaussian_weights(max(state.num_train_epochs, epoch), self.mean, self.std)[epoch - 1])
        self._total += weight
        for name, parameter in _named_trainable_parameters(model).items():
            self._sums[name] = self._sums.get(name, 0) + weight * parameter.detach().to("cpu", torch.float64)

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._total > 0:
            for name, parameter in _named_trainable_parameters(model).items():
                parameter.copy_(self._sums[name] / self._total)


def gaussian_weights(num_epochs: int, mean: float, std: float) -> torch.Tensor:
    """Returns the normal density at the epochs 1, 2, ..., divided by its sum, as (num_epochs,) in float64."""
    epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
    return torch.softmax(-((epochs - mean) ** 2) / (2 * std**2), dim=0)  # softmax avoids 0 / 0 far from the mean


class StopAtNonFinite(TrainerCallback):
    """
    Stops training as soon as a trained parameter contains NaN or Inf, from which it would not recover.

    By default, the Trainer continues and leaves NaN out of the losses that it logs. This callback checks the
    parameters after each step, before a checkpoint is written, so the last checkpoint is always finite.

    Raises:
        FloatingPointError: If a parameter contains NaN or Inf. The message names one and suggests what to try.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[StopAtNonFinite()])
    ```
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._trained = _named_trainable_parameters(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        broken = [name for name, parameter in self._trained.items() if not torch.isfinite(parameter).all()]
        if broken:
            raise FloatingPointError(
                f"NaN or Inf in {len(broken)} of the trained tensors ({broken[0]}, ...) after step "
                f"{state.global_step}: training has diverged, or the inputs contain NaN. Nothing was saved since. "
                "Try a lower learning rate, warm-up steps, max_grad_norm=1, or bf16 or float32 instead of fp16."
            )


def _named_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
