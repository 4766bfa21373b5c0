"""Modules import from the layers below their own only, and no file outgrows its subject."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from clip_prompt_peft.assets import PIPELINE_FILE


PACKAGE, CLI = ROOT / "clip_prompt_peft", ROOT / "clip_prompt_cli"
# one file is no part of the package: it is copied beside saved classifiers and imports the package from there
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PIPELINE_FILE})

# From the bottom up. What shares a line does not import each other.
LAYERS = [
    {"file_contents", "class_names"},
    {"assets", "towers", "templates", "heads", "image_files", "installing"},
    {"open_clip"},
    {"tuner"},  # a peft method: of this package it needs no more than what the test below says
    {"text", "labels"},
    {"class_head"},
    {"regularizers"},
    {"loss"},
    {"pretrained"},
    {"calibrated"},
    {"modeling"},
    {"families"},
    {"data", "training", "known_checkpoints"},
    {"evaluation"},
    {"peft_model"},
    {"auto"},
    {"pipelines", "protocols", "export"},
    {"__init__"},  # the public names
    {"commands"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(file: Path) -> str:
    """The module or subpackage of the package that a file is, or is in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(file: Path) -> set[str]:
    """What a file imports of the package, wherever in the file it does so."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            modules = [".".join((*package, *filter(None, [node.module]))) + f".{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        else:
            continue
        for module in modules:
            root, _, rest = module.partition(".")
            if root == PACKAGE.name:
                part = rest.partition(".")[0]
                parts.add(part if part in LEVEL else "__init__")
    return parts - {part_of(file)}


def test_every_part_has_a_layer():
    assert {part_of(file) for file in FILES} == LEVEL.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    upwards = {part for part in imported_parts(file) if LEVEL[part] >= LEVEL[part_of(file)]}
    assert not upwards, f"{part_of(file)} imports what is not below it"


def test_the_peft_method_stands_on_towers_heads_templates_and_files_alone():
    imported = set().union(*(imported_parts(file) for file in FILES if part_of(file) == "tuner"))
    assert imported <= {"towers", "templates", "heads", "file_contents", "open_clip"}


def roots_imported_by(file: Path) -> set[str]:
    """The names of the packages that a file imports by name."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return {module.partition(".")[0] for module in modules}


def test_the_command_line_stands_on_the_standard_library_alone():
    imported = set().union(*(roots_imported_by(file) for file in CLI.rglob("*.py")))
    assert imported - sys.stdlib_module_names <= {"argcomplete"}  # only to complete


def test_only_commands_know_the_command_line():
    knowing = {part_of(file) for file in FILES if CLI.name in roots_imported_by(file)}
    assert knowing == {"commands", "__main__"}


def test_no_file_has_more_than_500_lines():
    files = [*FILES, *CLI.rglob("*.py")]
    too_long = [str(file) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 500]
    assert not too_long
