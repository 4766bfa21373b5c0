"""Averaging over epochs (PromptSRC), and stopping a training that has diverged."""

from __future__ import annotations

import base64

import safetensors.torch
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


def gaussian_weights(num_epochs: int, mean: float, std: float) -> torch.Tensor:
    """(num_epochs,) in float64: the normal density at epochs 1, 2, ..., divided by their sum."""
    epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
    return torch.softmax(-((epochs - mean) ** 2) / (2 * std**2), dim=0)  # the form that cannot become 0 / 0


class GaussianPromptAveraging(TrainerCallback, ExportableState):
    """
    After training, the trained tensors are their weighted mean over the ends of all epochs; the weights are Gaussian.

    Only what is trained is averaged (the authors' code multiplies the frozen weights, too, which rounds them). Sums
    are kept in float64 and saved in the `trainer_state.json` of a checkpoint, so that a resumed training ends as an
    uninterrupted one. A training that stops early is averaged over the epochs that it had.

    Args:
        mean: epoch of the largest weight, counted from 1.
        std: in epochs.

    Source: Khattak et al., Self-regulating Prompts (ICCV 2023). Their settings: (15, 1) of 20 epochs from base to new
    classes, (6, 10) of 20 across data sets, (30, 30) or (45, 5) of 50 for few shots.

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
        """What a checkpoint keeps. Text, since it goes into a JSON file."""
        return {
            "args": {"mean": self.mean, "std": self.std},
            "attributes": {"encoded_sums": self.encoded_sums, "_total": self._total},
        }

    @property
    def encoded_sums(self) -> str:
        return base64.b64encode(safetensors.torch.save(self._sums)).decode("ascii")

    @encoded_sums.setter
    def encoded_sums(self, encoded: str) -> None:
        self._sums = safetensors.torch.load(base64.b64decode(encoded))

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError(
                "GaussianPromptAveraging takes the mean over epochs for the result, load_best_model_at_end one of "
                "them; leave one of the two out."
            )
        self._sums, self._total = {}, 0.0
        # The Trainer itself restores callbacks only with restore_callback_states_from_checkpoint, and silently not
        # without it.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        epoch = round(state.epoch)
        weight = float(gaussian_weights(max(state.num_train_epochs, epoch), self.mean, self.std)[epoch - 1])
        self._total += weight
        for name, parameter in _trained(model):
            sums = self._sums.get(name, 0)
            self._sums[name] = sums + weight * parameter.detach().to("cpu", torch.float64)

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._total == 0:
            return
        for name, parameter in _trained(model):
            parameter.copy_(self._sums[name] / self._total)


class StopAtNonFinite(TrainerCallback):
    """
    Ends a training as soon as a trained tensor holds NaN or Inf, which it would hold for ever.

    The Trainer itself goes on, and by default leaves NaN out of the losses that it logs. The tensors are looked at
    after every step, before a checkpoint is written, so the last checkpoint is a good one.

    Raises:
        FloatingPointError: says which tensors, and what to try.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[StopAtNonFinite()])
    ```
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._tensors = dict(_trained(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        broken = [name for name, parameter in self._tensors.items() if not torch.isfinite(parameter).all()]
        if broken:
            raise FloatingPointError(
                f"NaN or Inf in {len(broken)} of the trained tensors ({broken[0]}, ...) after step "
                f"{state.global_step}: the training has diverged, or there was NaN in the images or their embeddings. "
                "Nothing has been saved since. Try a lower learning rate, warm-up steps, max_grad_norm=1, or bf16 or "
                "float32 in place of fp16."
            )


def _trained(model):
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
