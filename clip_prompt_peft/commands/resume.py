"""Going on with a training that broke off, and what to say when one does."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch
from transformers import TrainingArguments

from ..data import UnreadableImageError
from ..training.checkpoints import checkpoint_damage, checkpoints_in, last_whole_checkpoint


logger = logging.getLogger(__name__)


def find_checkpoint(run_args: TrainingArguments) -> str | None:
    """The checkpoint to continue from, if --resume_from_checkpoint asks for it and there is a whole one.

    Raises:
        ValueError: checkpoints of an earlier run that is not to be continued, or one that is not there or not whole.
    """
    folder, wanted = run_args.output_dir, run_args.resume_from_checkpoint
    if wanted is None:
        left = checkpoints_in(folder)
        if left:
            raise ValueError(
                f"{left[-1]!r} is left of an earlier run. Add --resume_from_checkpoint true to continue it, or remove "
                "it, or choose another --output_dir."
            )
        return None
    if wanted == "true":
        return last_whole_checkpoint(folder)
    if not os.path.isdir(wanted):
        raise ValueError(f"--resume_from_checkpoint {wanted!r} is no folder; 'true' takes the last in {folder!r}.")
    damage = checkpoint_damage(wanted)
    if damage is not None:
        raise ValueError(
            f"The checkpoint {wanted!r} is not whole: {damage}. --resume_from_checkpoint true takes the last whole "
            f"one in {folder!r}."
        )
    return wanted


@contextlib.contextmanager
def explained(run_args: TrainingArguments) -> Iterator[None]:
    """Whatever ends the training within it before its time: says how to go on."""
    name = os.path.basename(sys.argv[0])
    try:
        yield
    except UnreadableImageError as error:
        sys.exit(f"{name}: error: {error} {_how_to_go_on(run_args)}")
    except FloatingPointError as error:  # would happen again at the same step
        checkpoint = last_whole_checkpoint(run_args.output_dir)
        sys.exit(f"{name}: error: {error}" + (f" The last checkpoint is {checkpoint!r}." if checkpoint else ""))
    except torch.OutOfMemoryError:
        logger.error(
            "Out of memory. Try a smaller --per_device_train_batch_size with --gradient_accumulation_steps, or, with "
            "many classes, a smaller model.class_encoder.batch_size. %s",
            _how_to_go_on(run_args),
        )
        raise
    except Exception:  # a full disk, a lost network drive, ...
        logger.error("The training broke off. Look below for the reason. %s", _how_to_go_on(run_args))
        raise


def _how_to_go_on(run_args: TrainingArguments) -> str:
    checkpoint = last_whole_checkpoint(run_args.output_dir)
    if checkpoint is None:
        return "There is no checkpoint to continue from (--save_strategy epoch makes some)."
    return f"Then continue {checkpoint!r}: the same command with --resume_from_checkpoint true."
