"""Lets mkdocstrings read docstrings in the form of transformers, which is Google's with types in backticks.

    name (`int`, *optional*, defaults to 3):   ->  name:, since the signature says the type and the default
    first, second (`str`):                     ->  first: and second:, each with the description of both
    see [`pad_template`]                       ->  a link to the reference, or code where there is no such name

Fields of a configuration are shown with their defaults, without the help that is beside them in the source.
"""

import ast
import re
from pathlib import Path

from griffe import Extension


REFERENCE = Path(__file__).parent / "reference"
# an argument, and the lines below it that are indented further
ARGUMENT = re.compile(r"^( +)(\w+(?:, \w+)*)(?: \((`.*|\*optional\*.*)\))?:\n((?:\1 +.*\n|\n)*)", re.MULTILINE)
RETURNED = re.compile(r"^( *Returns:\n +)(`.*?):(?= )", re.MULTILINE)  # the types
FIELD = "_option"  # of tuner/config.py: the default and the help of a field
LINK = re.compile(r"\[`~?([\w.]+)`\]")


def documented_names() -> dict[str, str]:
    """From the short name of what the reference shows to its path."""
    shown = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", shown, re.MULTILINE)}


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def __init__(self) -> None:
        self.names = documented_names()

    def on_package(self, *, pkg, **kwargs) -> None:
        self.rewrite(pkg)

    def rewrite(self, obj) -> None:
        """Rewrites the docstring of an object, and those of its members."""
        if obj.docstring:
            text = ARGUMENT.sub(lambda found: arguments(found, typed_names(obj)), obj.docstring.value + "\n")
            text = RETURNED.sub(lambda found: found[1] + found[2].replace("`", "") + ":", text)
            obj.docstring.value = LINK.sub(self.link, text).rstrip("\n")
        if obj.is_attribute:
            obj.value = without_help(obj.value)
        for member in obj.members.values():
            if not member.is_alias:
                self.rewrite(member)

    def link(self, found: re.Match) -> str:
        name = found[1].rpartition(".")[2]
        return f"[`{name}`][{self.names[name]}]" if name in self.names else f"`{name}`"


def without_help(value):
    """The default of a field, from the call that declares it."""
    if str(value).startswith(f"{FIELD}("):
        return ast.unparse(ast.parse(str(value), mode="eval").body.args[0])
    return value


def typed_names(obj) -> set[str]:
    """The arguments or attributes of an object whose types its source says."""
    if obj.is_class:
        of_init = typed_names(obj.members["__init__"]) if "__init__" in obj.members else set()
        return of_init | {name for name, member in obj.attributes.items() if member.annotation is not None}
    if obj.is_function:
        return {parameter.name.lstrip("*") for parameter in obj.parameters if parameter.annotation is not None}
    return set()


def arguments(found: re.Match, typed: set[str]) -> str:
    """Each argument by itself, with its type where the source does not say it."""
    indent, names, kind, description = found.groups()
    kind = re.sub(r", defaults to .*|`|\*", "", kind or "optional")
    kinds = {name: "" if name in typed or kind == "optional" else f" ({kind})" for name in names.split(", ")}
    return "".join(f"{indent}{name}{kind}:\n{description}" for name, kind in kinds.items())
