"""Detection of checkpoints that are incomplete or damaged.

The Trainer writes the files of a checkpoint directly into its final folder, `trainer_state.json` last. If the process
is killed or the disk is full, an incomplete folder remains, which `get_last_checkpoint` of transformers does not
notice, since it only looks at the names of folders.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tuner.files import WEIGHTS_NAME


logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
TRAINING_FILES = [OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state*.pth"]  # one random state per process


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Returns the last checkpoint in an output folder that is complete. Damaged ones are skipped with a warning.

    Args:
        output_dir (`str` or `os.PathLike`):
            The `output_dir` of the `TrainingArguments`. It does not have to exist.

    Returns:
        `str` or `None`: The path to pass to `Trainer.train(resume_from_checkpoint=...)`, or `None` if there is no
        complete checkpoint.

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
    """Returns all folders that are named like a checkpoint, complete or not, in the order of their steps."""
    matches = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in _folders_in(output_dir)}
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    return [str(path) for path in sorted(steps, key=steps.get)]


def checkpoint_damage(checkpoint: str | os.PathLike) -> str | None:
    """
    Describes what is missing or damaged in a checkpoint of an adapter, or returns `None` if it is complete.

    All files are read and compared with the checksums or lengths in them. The optimizer, scheduler and random state
    may all be missing (`save_only_model`), or be in sub-folders, where DeepSpeed and FSDP keep them.
    """
    folder = Path(checkpoint)
    expected = [TRAINER_STATE_NAME, CONFIG_NAME, WEIGHTS_NAME]
    if any(any(folder.glob(pattern)) for pattern in TRAINING_FILES) and not _folders_in(folder):
        expected += TRAINING_FILES
    for pattern in expected:
        files = sorted(folder.glob(pattern))
        if not files:
            return f"{pattern} is missing"
        for file in files:
            try:
                _check_content(file)
            except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
                return f"{file.name} is damaged ({error})"
    return None


def _folders_in(folder: str | os.PathLike) -> list[Path]:
    return list(Path(folder).glob("*/"))


def _check_content(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):  # compares the length of the file with its header
            pass
    else:  # torch.save writes ZIP archives
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
