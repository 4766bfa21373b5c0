"""The parser of each command: its help, its arguments, and errors about them in one line."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin, get_type_hints

from .fields import (
    NO_DEFAULT,
    TEST_TIME,
    BenchmarkArguments,
    DataFields,
    DataTrainingFields,
    ModelArguments,
    PromptFields,
    TrainerFields,
)
from .messages import PROGRAM, exit_with
from .texts import EXAMPLES, FIRST, SUMMARIES, USAGES


SETTINGS_FILES = (".json", ".yaml", ".yml")
# The dataclasses of a command; the library's parser turns them into arguments with their types.
DATACLASSES = {
    "train": (ModelArguments, DataTrainingFields, PromptFields, TrainerFields),
    "report": (DataFields,),
    "benchmark": (BenchmarkArguments,),
}
# Classes whose fields are further arguments: package, file in it, class. They are looked up without importing them.
MORE = {
    "train": ("transformers", "training_args.py", "TrainingArguments"),
    "benchmark": ("clip_prompt_peft", "protocols/methods.py", "TrainingSettings"),
}
HELP_ALL = "--help-all"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which is longer than a screen for some commands."""

    def error(self, message: str) -> NoReturn:
        exit_with(message)


class HelpAll(argparse.Action):
    """Prints the help with all arguments that are declared here."""

    def __call__(self, parser: argparse.ArgumentParser, *args, **kwargs) -> None:
        parser_of(parser.prog.rpartition(" ")[2], show_all=True).print_help()
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and gives the names of arguments a column that fits nearly all of them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def parser_of(name: str, show_all: bool = False) -> OneLineParser:
    """Returns the parser of a command.

    Args:
        name (`str`):
            The name of the command.
        show_all (`bool`, *optional*, defaults to `False`):
            Whether its help shows every argument that is declared here, and not only what is needed first.
    """
    parser = OneLineParser(f"{PROGRAM} {name}", formatter_class=HelpFormatter, allow_abbrev=False, add_help=False)
    fill(parser, name, show_all)
    return parser


def fill(parser: argparse.ArgumentParser, name: str, show_all: bool = False) -> None:
    """Adds description and arguments of a command."""
    examples = "".join(f"\n  {line}" for line in EXAMPLES[name])
    parser.usage = f"{PROGRAM} {name} {USAGES[name]}"
    parser.description = f"{SUMMARIES[name]}\n{examples}"
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--help_all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if name in FIRST:
        parser.epilog = f"{PROGRAM} {name} {HELP_ALL} shows all arguments."
        add_dataclasses(parser, name, show_all)
    if name in ADDITIONS:
        ADDITIONS[name](parser)


def add_dataclasses(parser: argparse.ArgumentParser, name: str, show_all: bool) -> None:
    """Adds the fields of the command's dataclasses, those that are needed first in groups."""
    found = {item.name: (item, of_type) for of_type in DATACLASSES[name] for item in fields(of_type)}
    for title, names in FIRST[name].items():
        group = parser.add_argument_group(title)
        for field_name in names:
            add_field(group, *found.pop(field_name))
    others = parser.add_argument_group("others")
    for field, of_type in found.values():
        add_field(others, field, of_type, is_shown=show_all)


def add_field(parser, field: Field, of_type: type, is_shown: bool = True) -> None:
    """Adds a field of a dataclass as `HfArgumentParser` does, but for booleans, which are read when a command runs."""
    hint = get_type_hints(of_type)[field.name]
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    literals = [hint, *kinds] if get_origin(hint) is Literal else kinds
    choices = next((get_args(kind) for kind in literals if get_origin(kind) is Literal), None)
    options = dict(field.metadata)
    if choices is not None:
        options["choices"] = choices
        if "metavar" in options:  # too many to stand beside the name
            options["help"] += f" One of {', '.join(choices)}."
    elif hint is bool:
        options |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    elif list in (get_origin(kind) for kind in (hint, *kinds)):
        options["nargs"] = "+"
    number = next((kind for kind in kinds if kind in (int, float)), None)
    if number is not None:
        options["type"] = number
    default = field.default if field.default is not MISSING else " ".join(map(str, field.default_factory()))
    help = options["help"].replace(NO_DEFAULT, "")
    if default not in (None, False) and NO_DEFAULT not in options["help"]:
        help = f"{help if help.endswith('...') else help.removesuffix('.')} (default: {default})"
    options["help"] = help if is_shown else argparse.SUPPRESS
    parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


def positive(text: str) -> int:
    """Returns the number that an argument gives, for `add_argument(type=positive)`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Returns the share that an argument gives, for `add_argument(type=share)`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, such as 0.9, got {text!r}")
    return value


def port(text: str) -> int:
    """Returns the port that an argument gives, for `add_argument(type=port)`."""
    if not text.isdecimal() or not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter to use, and where to compute."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder or Hub id of an adapter, or an output folder of `train`; of several, the first is used",
    )
    add_base(parser)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to compute: cpu, cuda, ... (cpu)")


def add_adapters(parser: argparse.ArgumentParser, default: str | None, help: str) -> None:
    """Adds the adapters to use, which may be written with the flag `--adapters` or without it."""
    group = parser.add_mutually_exclusive_group()
    # A default here would replace what the flag gives.
    group.add_argument("adapters", metavar="ADAPTERS", nargs="?", default=argparse.SUPPRESS, help=help)
    group.add_argument("--adapters", dest="adapters", metavar="ADAPTERS", default=default, help="the same")


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of another base model."""
    parser.add_argument("--base", metavar="MODEL", help="base model to use instead of the one that the adapters name")
    parser.add_argument("--base_revision", metavar="REVISION", help="its branch, tag or commit on the Hub")


def add_to_predict(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--top_k", metavar="NUMBER", type=positive, help="how many labels to show for each image (1)")
    parser.add_argument(
        "--coverage",
        metavar="SHARE",
        type=share,
        help="show sets of classes, which hold the right one for this share of images, such as 0.9, of the kind that "
        "the adapter was calibrated with (`train --calibrate true`)",
    )
    parser.add_argument(
        "--test_time",
        choices=TEST_TIME,
        help="adapt to the images without labels: tune the prompt to 64 views of each (tpt; c-tpt, r-tpt: with other "
        "objectives), or keep caches of those that came before (tda)",
    )
    parser.add_argument("--batch_size", metavar="NUMBER", type=positive, default=32, help="images at a time (32)")


def add_to_report(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument(
        "--split", metavar="NAME", help="the split of the data to test on; by default that of the command `train`"
    )
    parser.add_argument("--output", metavar="FILE", default="report.html", help="the file to write (report.html)")


def add_to_export(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("output_dir", metavar="OUT", help="the folder to write to")
    parser.add_argument(
        "--test_dir",
        metavar="FOLDER",
        help="some dozens of images, with one sub-folder for each class, on which to compare the exported graph with "
        "the model; by default random pixels",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="write a graph with 8-bit weights, too, if its accuracy on --test_dir is at most one point lower",
    )


def add_to_serve(parser: argparse.ArgumentParser) -> None:
    add_adapters(
        parser,
        default="outputs/prompt_tuning",
        help="an adapter, a Hub id, or a folder whose sub-folders are adapters (default: outputs/prompt_tuning)",
    )
    add_base(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", metavar="NUMBER", type=port, default=8000, help="port to listen on (8000)")
    parser.add_argument(
        "--max_adapters", metavar="NUMBER", type=positive, default=500, help="how many may be loaded at once (500)"
    )
    parser.add_argument(
        "--max_upload", metavar="BYTES", type=positive, default=10 * 2**20, help="bytes of a request (10 MiB)"
    )


def add_to_demo(parser: argparse.ArgumentParser) -> None:
    add_adapters(
        parser,
        default=None,
        help="an adapter, a Hub id, or a folder whose sub-folders are adapters; by default two are tuned first",
    )
    add_base(parser)
    parser.add_argument("--port", metavar="NUMBER", type=port, default=7860, help="port to listen on (7860)")


def add_to_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT", help="the file model.pth.tar-N or lora_weights.pt")
    parser.add_argument("output_dir", metavar="OUT", help="folder for the adapter")
    parser.add_argument(
        "--base_model_name_or_path", metavar="MODEL", required=True, help="Hub id or folder of the same CLIP"
    )
    parser.add_argument(
        "--model_revision", dest="revision", metavar="REVISION", help="branch, tag or commit of the CLIP on the Hub"
    )
    parser.add_argument(
        "--class_names", metavar="NAME", nargs="+", help="the class names of the training, in its order"
    )
    parser.add_argument(
        "--prompt_template", metavar="TEXT", default="a photo of a {}.", help="the template of the training"
    )
    parser.add_argument(
        "--class_token_position",
        default="end",
        choices=["end", "middle", "front"],
        help="CoOp's CLASS_TOKEN_POSITION (end)",
    )
    parser.add_argument(
        "--no_check",
        dest="check_prompts",
        action="store_false",
        help="do not compare texts with those of the training",
    )


def add_to_convert_open_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name_or_path", metavar="NAME", help="Hub id or folder with an open_clip_config.json")
    parser.add_argument("output_dir", metavar="OUT", help="the folder to write, which must not exist or be empty")
    parser.add_argument(
        "--model_revision", dest="revision", metavar="REVISION", help="branch, tag or commit on the Hub"
    )


ADDITIONS = {
    "predict": add_to_predict,
    "report": add_to_report,
    "export": add_to_export,
    "serve": add_to_serve,
    "demo": add_to_demo,
    "convert": add_to_convert,
    "convert-open-clip": add_to_convert_open_clip,
}


def parse(name: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of a command whose arguments are all declared here, or ends with help or an error."""
    arguments = with_underscores(sys.argv[1:] if arguments is None else arguments)
    return parser_of(name).parse_args(arguments)


def check(name: str, arguments: Sequence[str] | None = None) -> list[str]:
    """Ends with the help, if it is asked for, or with an error of one line, as far as that needs no other package.

    Args:
        name (`str`):
            The name of the command.
        arguments (`Sequence[str]`, *optional*):
            Its arguments, by default those of the command line.

    Returns:
        `list[str]`: The arguments.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if name in DATACLASSES:
        check_flags(name, with_underscores(arguments))
    else:
        parse(name, arguments)
    return arguments


def check_flags(name: str, arguments: list[str]) -> None:
    """Does this for a command that has further arguments."""
    if name == "train" and arguments and not arguments[0].startswith("-"):
        if not arguments[0].endswith(SETTINGS_FILES):
            exit_with(follows_no_argument(arguments[0]))
        if not Path(arguments[0]).is_file():
            exit_with(f"The file {arguments[0]!r} with arguments does not exist.")
        arguments = arguments[1:]
    if with_underscores([HELP_ALL])[0] in arguments and name in MORE:
        return  # the library's parser shows all of them
    parser = parser_of(name)
    _, unknown = parser.parse_known_args(arguments)
    unknown = [flag.partition("=")[0] for flag in unknown if re.match(r"-+[a-zA-Z]", flag)]
    if unknown:
        known = flags_of(name)
        wrong = [flag for flag in unknown if not flag.startswith("--") or flag[2:].removeprefix("no_") not in known]
        if known and wrong:
            exit_with(no_such_argument(wrong[0], known))


def flags_of(name: str) -> set[str]:
    """Returns the names of all flags of a command, or an empty set if they are not known without importing more."""
    of_parser = {flag.lstrip("-") for action in parser_of(name)._actions for flag in action.option_strings}
    more = field_names(*MORE[name]) if name in MORE else set()
    return of_parser | more if more or name not in MORE else set()


@cache
def field_names(package: str, file: str, class_name: str) -> set[str]:
    """Returns the names of the fields of a class, read from its source, for importing it would take seconds."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        return set()
    source = Path(found.submodule_search_locations[0], file)
    if not source.is_file():
        return set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return set()


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Writes flags as they are declared: `--train-dir` is `--train_dir`, as `HfArgumentParser` has it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is no flag
    written = []
    for argument in arguments[:end]:
        flag, equals, value = argument.partition("=")
        written.append(f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument)
    return [*written, *arguments[end:]]


def no_such_argument(flag: str, known: Iterable[str]) -> str:
    """Says that there is no such flag, and which of the known ones may be meant."""
    similar = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), sorted(known), n=1)
    hint = f"did you mean --{similar[0]}?" if similar else "--help lists those that there are."
    return f"There is no argument {flag!r}; {hint}"


def follows_no_argument(word: str) -> str:
    return f"{word!r} follows no argument; --help lists those that take a value."
