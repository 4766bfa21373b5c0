"""What the commands share: a parser, errors in one line, a stop by Ctrl-C, optional packages, the table of results."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import datasets
import huggingface_hub.utils.logging
import torch
import transformers
from transformers import HfArgumentParser

from clip_prompt_cli.messages import STOPPED, exit_with, program_name
from clip_prompt_cli.parsers import HELP_ALL, OneLineParser, follows_no_argument, no_such_argument, with_underscores

from ..assets import TINY_CLIP
from ..evaluation.tables import aligned, percent
from ..installing import how_to_install


# The metrics in a table of results, and the names of their columns.
COLUMNS = {"accuracy": "accuracy", "mean_class_accuracy": "class mean"}
# Arguments of functions that a flag of another name sets.
FLAG_OF = {"image_column": "image_column_name", "label_column": "label_column_name", "num_shots": "shots"}

Results = Mapping[str, Mapping[str, float]]  # test set -> metric -> value from 0 to 1


@contextlib.contextmanager
def errors_in_one_line(flags: Iterable[str] = ()) -> Iterator[None]:
    """Ends the command with a message of one line at errors that the user's input can cause.

    Args:
        flags (`Iterable[str]`, *optional*):
            The names of the command's flags. Where the message names an argument of a function, it is replaced by the
            flag that sets it, see [`name_flags`].
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        exit_with(name_flags(str(error), flags))


def name_flags(message: str, flags: Iterable[str]) -> str:
    """Returns a message about arguments of functions as one about flags.

    A name is replaced if it holds an underscore or is followed by a value: `"label_column"`, `"augment=False"`.
    """
    names = {name: name for name in flags}
    names |= {argument: flag for argument, flag in FLAG_OF.items() if flag in names}
    if not names:
        return message
    pattern = rf"(?<![-\w./'\"])({'|'.join(sorted(names, key=len, reverse=True))})(?:=(['\"]?)(\w+)\2)?(?![\w/'\"=])"

    def flag(match: re.Match) -> str:
        name, _, value = match.groups()
        if value is None:
            return f"--{names[name]}" if "_" in name else name
        return f"--{names[name]} {value}"

    return re.sub(pattern, flag, message)


@contextlib.contextmanager
def stopped_in_one_line(how_to_go_on: Callable[[], str] = str) -> Iterator[None]:
    """Ends the command with one line and the exit code 130 if the user presses Ctrl-C.

    Args:
        how_to_go_on (`Callable[[], str]`, *optional*):
            Returns what is done already, and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped. {how_to_go_on()}".rstrip(), file=sys.stderr)
        sys.exit(STOPPED)


class DataclassParser(OneLineParser, HfArgumentParser):
    """The same for arguments that are fields of dataclasses."""

    def __init__(self, dataclasses: Iterable[type], **kwargs) -> None:
        # abbreviations would not be noticed as given by the user
        super().__init__(dataclasses, prog=program_name(), allow_abbrev=False, **kwargs)
        self.add_argument(HELP_ALL, "--help_all", action="help", help="show all arguments")

    @property
    def flags(self) -> list[str]:
        """The names of all flags, without dashes."""
        return [flag.name for of_type in self.dataclass_types for flag in fields(of_type)]

    def parse(self, arguments: Sequence[str]) -> tuple:
        """Returns the dataclasses and, if there are arguments of none of them, their namespace.

        Raises:
            ValueError: If there are unknown arguments. The message names flags of a similar name.
        """
        *parsed, unknown = self.parse_args_into_dataclasses(
            with_underscores(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            name = unknown[0].partition("=")[0]
            raise ValueError(no_such_argument(name, self.flags) if name.startswith("-") else follows_no_argument(name))
        return tuple(parsed)


def check_device(name: str) -> None:
    """Raises `ValueError` if a device cannot be used, for `--device`."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used on this machine ({reason}); 'cpu' can.") from None


def check_extra(extra: str, *modules: str) -> None:
    """Checks that the packages of an optional feature are installed, before any work.

    Raises:
        ImportError: If one is not. The message has the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"This command needs {', '.join(missing)}; {how_to_install(extra)}.")


def check_output_file(path: str) -> None:
    """Raises `ValueError` if a file cannot be written."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else f"lies in {str(target.parent)!r}, which is no folder"
        raise ValueError(f"--output {path!r} {problem}; give the name of a file in an existing folder.")


def silence_libraries(progress_bars: bool = False) -> None:
    """Hides or, with `progress_bars`, shows the bars of transformers, and lets huggingface_hub say everything once."""
    huggingface_hub.utils.logging.disable_propagation()  # it has a handler of its own beside that of the root logger
    if progress_bars:
        transformers.utils.logging.enable_progress_bar()
    else:
        transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def progress_bars_of_datasets(are_shown: bool) -> Iterator[None]:
    """Shows the progress of `datasets`, which commands hide elsewhere: reading files would show one for each file."""
    if are_shown:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()


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
