"""What the commands share: errors in one line, quiet libraries, adapters to load, and the table of results."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import AutoImageProcessor, BaseImageProcessor

from .. import AutoPeftModelForPromptClassification, PeftModelForPromptClassification
from ..assets import TINY_CLIP
from ..evaluation.tables import aligned, percent


# The metrics in a table of results, and the names of their columns.
COLUMNS = {"accuracy": "accuracy", "mean_class_accuracy": "class mean"}

Results = Mapping[str, Mapping[str, float]]  # test set -> metric -> value from 0 to 1


def program_name() -> str:
    """The running command as the user types it."""
    return f"python -m {__package__}.{Path(sys.argv[0]).stem}"


def exit_with(error: Exception | str) -> NoReturn:
    """Ends the command with an error message of one line instead of a traceback."""
    sys.exit(f"{program_name()}: error: {error}")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the command with a message of one line at errors that the user's input can cause."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        exit_with(error)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the command's module docstring as it is."""
    return argparse.ArgumentParser(
        program_name(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def argument(default, help: str):
    """Returns the field of a dataclass that `HfArgumentParser` turns into an argument."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of [`load_adapter`]."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter, such as outputs/prompt_tuning/seed1")
    parser.add_argument("--base", help="base model to use instead of the one that the adapter names")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, ...")


def load_adapter(args: argparse.Namespace) -> tuple[PeftModelForPromptClassification, BaseImageProcessor]:
    """Loads the classifier of an adapter in evaluation mode, and the image processor of its base model.

    Args:
        args (`argparse.Namespace`):
            The arguments of [`add_adapter_arguments`].

    Raises:
        ValueError: If the adapter is damaged or does not fit the base model.
        OSError: If the adapter or its base model is not found.
    """
    model = AutoPeftModelForPromptClassification.from_pretrained(args.adapter, base_model_name_or_path=args.base)
    base, hub = model.get_base_model().name_or_path, model.get_base_model().hub_settings.arguments
    use_one_thread_if_tiny(base)
    return model.eval().to(args.device), AutoImageProcessor.from_pretrained(base, trust_remote_code=False, **hub)


def silence_libraries(progress_bars: bool = False) -> None:
    """Hides a warning that users cannot act on and, unless `progress_bars`, the loading bars of transformers."""
    if not progress_bars:
        transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def use_one_thread_if_tiny(model_name_or_path: str) -> None:
    """Limits torch to one thread for the tiny CLIP, which more threads only slow down on a busy machine."""
    if model_name_or_path == TINY_CLIP:
        torch.set_num_threads(1)


def results_table(zero_shot: Results, tuned: Sequence[Results]) -> str:
    """Returns a table in percent with one line for each test set.

    Args:
        zero_shot (`Mapping[str, Mapping[str, float]]`):
            The metrics of the model without adapter by test set.
        tuned (`Sequence[Mapping[str, Mapping[str, float]]]`):
            The metrics of every adapter. For several, the table shows mean and (population) standard deviation.
    """
    lines = [["test images", *(f"{name}, {kind}" for name in COLUMNS.values() for kind in ("zero-shot", "tuned"))]]
    for test_set, before in zero_shot.items():
        line = [test_set]
        for metric in COLUMNS:
            line += [percent([before[metric]]), percent([results[test_set][metric] for results in tuned])]
        lines.append(line)
    return aligned(lines)
