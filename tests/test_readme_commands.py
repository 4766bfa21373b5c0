"""The command lines in README and the docs are ones that our commands and scripts accept."""

import argparse
import importlib
import re
import runpy
import shlex

import pytest
from conftest import ROOT
from readme_snippets import DOCUMENTS

from clip_prompt_cli.parsers import DATACLASSES, OneLineParser


COMMAND = re.compile(
    r"(?:(?:-m clip_prompt_peft\.commands\.|clip-prompt )(?P<module>[a-z][\w-]*)"
    r"|python (?P<script>(?:examples|benchmarks|tests)/[\w/]+\.py))"
    r"(?P<arguments>[^`\n]*)"
)
WITHOUT_A_PARSER = {f"tests/helpers/{name}.py" for name in ("dying_process", "readme_snippets", "run_notebook")} | {
    "examples/classify_onnx.py",  # a short script that needs few packages
    "tests/golden/record_open_clip.py",  # needs open_clip
}
PACKAGE = "clip_prompt_peft.commands"


def command_lines(document):
    """The commands of a document as (module or script, arguments)."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for found in COMMAND.finditer(text):
        arguments = shlex.split(found["arguments"].partition("&&")[0].partition(";")[0], comments=True)
        yield found["module"] or found["script"], [argument for argument in arguments if argument != "..."]


LINES = sorted({(target, *arguments) for document in DOCUMENTS for target, arguments in command_lines(document)})


def is_a_name(line):
    """Whether a command is only mentioned, where its arguments are not at issue."""
    return len(line) == 1 and line[0] in ("predict", "report", "export", "convert", "convert-open-clip")


class Parsed(BaseException):
    """Ends a command as soon as its arguments are parsed; no command handles it."""


@pytest.fixture
def parse(monkeypatch):
    """Returns a function that lets a command parse a command line, and gives what the parser did not know."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_end(parser, *args, **kwargs):
        parsed = parse_known_args(parser, *args, **kwargs)
        if type(parser) is OneLineParser and parser.prog.split()[-1] in DATACLASSES:
            return parsed  # the first look, which does not know all arguments
        raise Parsed(parsed[1])

    def parse(target, *arguments):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
        monkeypatch.setattr("sys.argv", [target, *arguments])
        with pytest.raises(Parsed) as ended:
            if target.endswith(".py"):
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                importlib.import_module(f"{PACKAGE}.{target.replace('-', '_')}").main()
        return ended.value.args[0]

    return parse


def test_the_command_lines_are_found():
    targets = {line[0] for line in LINES}
    assert {"train", "report", "predict", "serve", "benchmark", "demo", "benchmarks/step_time.py"} <= targets
    assert any("--push_to_hub" in line for line in LINES)  # behind a line that goes on
    assert ("train", "--dataloader_drop_last") in LINES  # in front of a comment


@pytest.mark.parametrize(
    "line", [line for line in LINES if line[0] not in WITHOUT_A_PARSER and not is_a_name(line)], ids=" ".join
)
def test_a_command_line_is_parsed(line, parse, monkeypatch, tmp_path):
    (tmp_path / "settings.yaml").write_text("shots: 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "helpers")
    assert parse(*line) == []


def test_a_wrong_flag_would_be_noticed(parse):
    with pytest.raises(SystemExit, match="no argument '--train_dirs'; did you mean --train_dir"):
        parse("train", "--train_dirs", "photos")
    assert parse("serve", "--adapter_folder", "photos") == ["--adapter_folder"]
