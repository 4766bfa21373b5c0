"""Telling a whole checkpoint of the Trainer from one that broke off while it was written.

The Trainer writes the files of a checkpoint one after the other into its final folder, `trainer_state.json` last, and
transformers' `get_last_checkpoint` goes by the names of the folders alone. A process that is killed meanwhile, or a
disk that is full, leaves a folder that it would take for a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tuner.files import WEIGHTS_NAME


logger = logging.getLogger(__name__)

OF_TRAINING = [OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state*.pth"]  # the last: one for each process


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The checkpoint with the most steps in a folder of the Trainer; damaged ones are passed over, with a warning.

    Args:
        output_dir: of the `TrainingArguments`; need not exist.

    Returns:
        Its path for `Trainer.train(resume_from_checkpoint=...)`; `None` if there is no whole one.

    Example:

    ```py
    >>> trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output_dir))
    ```
    """
    for checkpoint in reversed(checkpoints_in(output_dir)):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is passed over, since it is not whole: %s. It can be deleted.", checkpoint, damage)
    return None


def checkpoints_in(output_dir: str | os.PathLike) -> list[str]:
    """All folders that are named like a checkpoint, whole or not, by their number of steps."""
    folders = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in _folders_in(output_dir)}
    steps = {path: int(number) for path, number in folders.items() if number != path.name and number.isdecimal()}
    return [str(path) for path in sorted(steps, key=steps.get)]


def checkpoint_damage(checkpoint: str | os.PathLike) -> str | None:
    """What is missing, cut off or changed in a checkpoint of an adapter's training; `None` if nothing is.

    The contents of all files are read: their formats hold checksums or lengths. Optimizer, scheduler and random state
    may be missing together (`save_only_model`), or beside sub-folders, in which DeepSpeed and FSDP keep them.
    """
    folder = Path(checkpoint)
    needed = [TRAINER_STATE_NAME, CONFIG_NAME, WEIGHTS_NAME]
    if any(any(folder.glob(pattern)) for pattern in OF_TRAINING) and not _folders_in(folder):
        needed += OF_TRAINING
    for pattern in needed:
        files = sorted(folder.glob(pattern))
        if not files:
            return f"{pattern} is missing"
        for file in files:
            try:
                READERS[file.suffix](file)
            except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
                return f"{file.name} is damaged ({error})"
    return None


def _folders_in(folder: str | os.PathLike) -> list[Path]:
    return [path for path in Path(folder).glob("*") if path.is_dir()]  # the pattern "*/" gives files, too, in 3.10


def _read_json(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


def _read_safetensors(file: Path) -> None:
    with safe_open(file, framework="pt"):  # compares the length of the file with the header
        pass


def _read_torch_file(file: Path) -> None:
    with zipfile.ZipFile(file) as content:
        damaged = content.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")


READERS = {".json": _read_json, ".safetensors": _read_safetensors, ".pt": _read_torch_file, ".pth": _read_torch_file}
