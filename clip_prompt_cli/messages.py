"""The names of the commands, as help and all messages write them, and errors in one line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NoReturn


PROGRAM = "clip-prompt"
# The exit codes of a shell for a program that was stopped by Ctrl-C, or whose reader has gone, as in `... | head`.
STOPPED, NOBODY_READS = 130, 141
COMMANDS = {
    "train": "tune the prompt of a CLIP on a few images per class",
    "predict": "classify image files with an adapter",
    "report": "write what an adapter learned, and how accurate it is, into one HTML file",
    "benchmark": "compare methods in the protocols of the field",
    "export": "write a classifier as ONNX, for machines without PyTorch",
    "serve": "classify over HTTP, with any number of adapters on one CLIP",
    "demo": "show zero-shot and tuned side by side in the browser",
    "convert": "turn a checkpoint of the original authors' code into an adapter",
    "convert-open-clip": "write a checkpoint of open_clip in the format of transformers",
}


def command_line(name: str, *arguments: str) -> str:
    """Returns a command as a user types it; words with spaces are quoted, and placeholders (`"IMAGE ..."`) not."""
    words = (word if word.endswith("...") else shlex.quote(word) for word in arguments)
    return " ".join((PROGRAM, name, *words))


def program_name() -> str:
    """The running command as the user types it, whether it was started as a program or as a module."""
    started_as = (Path(sys.argv[0]).stem, *sys.argv[1:2])
    return " ".join((PROGRAM, *[word for word in started_as if word in COMMANDS][:1]))


def exit_with(error: Exception | str) -> NoReturn:
    """Ends the command with an error message of one line instead of a traceback."""
    sys.exit(f"{program_name()}: error: {' '.join(str(error).split())}")
