"""Continuing an interrupted training, and the messages that say how."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import torch
from transformers import TrainingArguments

from clip_prompt_cli.messages import exit_with

from ..data import UnreadableImageError
from ..evaluation.tables import counted
from ..training.checkpoints import checkpoint_damage, checkpoints_in, last_whole_checkpoint
from ..tuner.files import WEIGHTS_NAME


logger = logging.getLogger(__name__)


def find_checkpoint(run_args: TrainingArguments) -> str | None:
    """Returns the checkpoint that `--resume_from_checkpoint` asks for, or `None` if there is nothing to continue.

    Raises:
        ValueError: If a checkpoint is named that is missing or damaged, or if there are checkpoints of an earlier run
            and none is asked for.
    """
    folder, wanted = run_args.output_dir, run_args.resume_from_checkpoint
    if wanted == "true":
        return last_whole_checkpoint(folder)
    if wanted is None:
        if left := checkpoints_in(folder):
            raise ValueError(
                f"{left[-1]!r} is left of an earlier run. Add --resume_from_checkpoint true to continue it, or remove "
                "it, or choose another --output_dir."
            )
        return None
    if not os.path.isdir(wanted):
        raise ValueError(f"--resume_from_checkpoint {wanted!r} is no folder; 'true' takes the last in {folder!r}.")
    if damage := checkpoint_damage(wanted):
        raise ValueError(
            f"The checkpoint {wanted!r} is not whole: {damage}. --resume_from_checkpoint true takes the last whole "
            f"one in {folder!r}."
        )
    return wanted


@contextlib.contextmanager
def hint_at_checkpoint(run_args: TrainingArguments) -> Iterator[None]:
    """Adds to any error in the training how to avoid it and how to continue."""
    try:
        yield
    except UnreadableImageError as error:  # found before the first step, unless images are read in every step
        continued = f" {_how_to_continue(run_args)}" if last_whole_checkpoint(run_args.output_dir) else ""
        exit_with(f"{error}{continued}")
    except FloatingPointError as error:  # a continued training would diverge at the same step
        checkpoint = last_whole_checkpoint(run_args.output_dir)
        exit_with(f"{error}" + (f" The last checkpoint is {checkpoint!r}." if checkpoint else ""))
    except torch.OutOfMemoryError:
        logger.error(
            "Out of memory. Try a smaller --per_device_train_batch_size with --gradient_accumulation_steps, or, with "
            "many classes, a smaller model.class_encoder.batch_size. %s",
            _how_to_continue(run_args),
        )
        raise
    except Exception:  # a full disk, a lost network drive, ...
        logger.error("The training stopped because of the error below. %s", _how_to_continue(run_args))
        raise


def what_is_done(runs: Sequence[TrainingArguments]) -> str:
    """Says which seeds of a training that is stopped are done, and how to go on."""
    done = [run_args for run_args in runs if _is_finished(run_args)]
    if not done and not any(checkpoints_in(run_args.output_dir) for run_args in runs):
        return f"Nothing is saved yet.{_how_to_save(runs)}"
    number = f"{len(done)} of {counted(len(runs), 'seed')} {'is' if len(runs) == 1 else 'are'} done"
    if any(checkpoints_in(run_args.output_dir) for run_args in runs):
        return f"{number}; the same command with --resume_from_checkpoint true goes on from the last checkpoint."
    return f"{number}; run the same command again to train all of them."


def _how_to_save(runs: Sequence[TrainingArguments]) -> str:
    if any(run_args.save_strategy != "no" for run_args in runs):
        return ""
    return " With --save_strategy epoch there are checkpoints to continue from."


def _is_finished(run_args: TrainingArguments) -> bool:
    return os.path.isfile(os.path.join(run_args.output_dir, WEIGHTS_NAME))


def _how_to_continue(run_args: TrainingArguments) -> str:
    checkpoint = last_whole_checkpoint(run_args.output_dir)
    if checkpoint is None:
        return f"There is no checkpoint to continue from.{_how_to_save([run_args])}"
    return f"Then continue {checkpoint!r}: the same command with --resume_from_checkpoint true."
