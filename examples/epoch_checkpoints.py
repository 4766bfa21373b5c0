"""Checkpoints of run_prompt_tuning_no_trainer.py: by Accelerate, with the adapter in place of the whole model."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator
from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights


NAME = re.compile(r"epoch_(\d+)")


def find_checkpoint(args: Namespace) -> str | None:
    """The folder to continue from.

    Raises:
        ValueError: there is none, or there are some of an earlier run that is not to be continued.
    """
    found = [path for path in Path(args.output_dir).glob("epoch_*") if NAME.fullmatch(path.name)]
    last = max(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), default=None)
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if last is not None:
            raise ValueError(
                f"{str(last)!r} is left of an earlier run. Add --resume_from_checkpoint true to continue it, or "
                "remove it, or choose another --output_dir."
            )
        return None
    if wanted == "true":
        return None if last is None else str(last)
    if not (os.path.isdir(wanted) and NAME.fullmatch(os.path.basename(os.path.normpath(wanted)))):
        raise ValueError(f"--resume_from_checkpoint {wanted!r} is no folder of a checkpoint, such as out/epoch_3.")
    return wanted


class Checkpoints:
    """
    Saves and restores all that a training goes on with, after an epoch.

    Args:
        accelerator: with everything prepared.
        folder: to save in; `None` saves nothing.
    """

    def __init__(self, accelerator: Accelerator, folder: str | None) -> None:
        self.accelerator, self.folder = accelerator, folder
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def save(self, epoch: int) -> None:
        if self.folder is None:
            return
        path = os.path.join(self.folder, f"epoch_{epoch}")
        self.accelerator.save_state(f"{path}.part")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.rename(f"{path}.part", path)  # now that it is whole

    def resume(self, checkpoint: str | None) -> int:
        """Restores a checkpoint and returns how many epochs it has had."""
        if checkpoint is None:
            return 0
        self.accelerator.load_state(checkpoint)
        return int(NAME.fullmatch(os.path.basename(os.path.normpath(checkpoint)))[1])

    def _save_adapter(self, models: list, weights: list, folder: str) -> None:
        weights.clear()  # the frozen model need not be saved
        for model in models:
            self.accelerator.unwrap_model(model).save_pretrained(
                folder, is_main_process=self.accelerator.is_main_process
            )

    def _load_adapter(self, models: list, folder: str) -> None:
        while models:
            model = self.accelerator.unwrap_model(models.pop())
            set_peft_model_state_dict(model, load_peft_weights(folder, device=str(self.accelerator.device)))
