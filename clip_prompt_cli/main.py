"""The program `clip-prompt`: finds the command, and imports the library only if it really runs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .messages import COMMANDS, NOBODY_READS, PROGRAM, STOPPED, exit_with
from .parsers import HELP_ALL, OneLineParser, check, field_names, fill


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with arguments, by default those of the command line."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help", HELP_ALL):
        print(overview(), end="")
        sys.exit(0 if name else 1)
    if name == "--version":
        print(f"{PROGRAM} {version('clip_prompt_peft')}")
        return
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        exit_with(
            f"There is no command {name!r}; "
            + (f"did you mean {similar[0]!r}?" if similar else f"there are {', '.join(COMMANDS)}.")
        )
    check(name, rest)
    os.environ.setdefault("TQDM_DELAY", "2")  # seconds: no bars of what takes less; read when tqdm is imported
    try:
        import_module(f"clip_prompt_peft.commands.{name.replace('-', '_')}").main(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:  # while importing; commands say how to go on
        print("\nStopped.", file=sys.stderr)
        sys.exit(STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        sys.exit(NOBODY_READS)


def overview() -> str:
    """Returns the help of the program."""
    lines = "\n".join(f"  {name:<18}{text}" for name, text in COMMANDS.items())
    return f"""\
usage: {PROGRAM} COMMAND ...

Tunes the words in front of class names for a frozen CLIP, and uses what was learned.

{lines}

  {PROGRAM} train                                   # the embedded tiny CLIP and pictures, for a try
  {PROGRAM} train --train_dir pets/train --test_dir pets/test --output_dir outputs/pets
  {PROGRAM} predict outputs/pets cat.jpg

{PROGRAM} COMMAND --help shows what a command needs first, and {HELP_ALL} everything. --version shows the version.
For completion by Tab, in bash or zsh: pip install argcomplete && eval "$(register-python-argcomplete {PROGRAM})"
"""


def complete() -> None:
    """Answers the shell that asks, after Tab, how a word may go on."""
    # argcomplete is what pipx and others complete with. It asks the program itself, so that no script has to be
    # generated and kept up to date, and only those who switch it on need it.
    import argcomplete

    parser = OneLineParser(PROGRAM)
    commands = parser.add_subparsers()
    for name in COMMANDS:
        command = commands.add_parser(name, add_help=False)
        fill(command, name, show_all=True)
        if name == "train":
            of_parser = {action.dest for action in command._actions}
            for flag in field_names("transformers", "training_args.py", "TrainingArguments") - of_parser:
                command.add_argument(f"--{flag}")
    argcomplete.autocomplete(parser)
