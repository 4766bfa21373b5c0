"""The program `clip-prompt`: help and mistakes without the library, and commands that get their arguments."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from clip_prompt_cli.main import main
from clip_prompt_cli.messages import COMMANDS, command_line


# Runs the program with each of some lists of arguments, and prints what came of it, and which packages were imported.
SCRIPT = """
import contextlib, io, json, sys
from clip_prompt_cli.main import main
ended = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["clip-prompt", *arguments]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
    ended.append([code, output.getvalue()])
print(json.dumps([ended, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
HEAVY = {"clip_prompt_peft", "torch", "transformers", "peft", "datasets", "numpy", "PIL", "yaml"}
HELP = [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS), ["train", "--shots", "4", "-h"]]
MISTAKES = [
    (["trian"], "clip-prompt: error: There is no command 'trian'; did you mean 'train'?"),
    (["--verbose"], "clip-prompt: error: There is no command '--verbose'; there are train, predict, "),
    (
        ["train", "--train_dri", "x"],
        "clip-prompt train: error: There is no argument '--train_dri'; did you mean --tr",
    ),
    (["train", "--train-dri=x"], "There is no argument '--train_dri'; did you mean --train_dir?"),
    (["train", "--wieght_decay", "0.1"], "There is no argument '--wieght_decay'; did you mean --weight_decay?"),
    (["train", "--style", "crayon"], "argument --style: invalid choice: 'crayon' (choose from"),
    (["train", "--shots", "four"], "argument --shots: invalid int value: 'four'"),
    (["benchmark", "--shots", "1", "x"], "argument --shots: invalid int value: 'x'"),
    (["TRAIN"], "did you mean 'train'?"),
    (["train", "-shots", "4"], "There is no argument '-shots'; did you mean --shots?"),
    (["train", "gone.yaml"], "The file 'gone.yaml' with arguments does not exist"),
    (["train", "photos"], "'photos' follows no argument"),
    (["report", "out", "--ouput", "x"], "There is no argument '--ouput'; did you mean --output?"),
    (
        ["benchmark", "--lora_learning_rat", "3"],
        "There is no argument '--lora_learning_rat'; did you mean --lora_learning_rate?",
    ),
    (["predict", "out"], "clip-prompt predict: error: the following arguments are required: IMAGE"),
    (["predict", "out", "cat.jpg", "--top_k", "0"], "expected a whole number of 1 or more, got '0'"),
    (["predict", "out", "cat.jpg", "--topk", "1"], "unrecognized arguments: --topk"),
    (["export", "out"], "clip-prompt export: error: the following arguments are required: OUT"),
    (["convert", "model.pth.tar-5", "out"], "required: --base_model_name_or_path"),
    (["convert-open-clip", "me/model"], "required: OUT"),
    (["serve", "--port", "99999"], "clip-prompt serve: error: argument --port: expected a port from 0 to 65535"),
]


@pytest.fixture(scope="module")
def without_the_library():
    """What came of `HELP` and `MISTAKES`, and the packages that were imported."""
    lines = [*HELP, *(arguments for arguments, _ in MISTAKES)]
    command = [sys.executable, "-c", SCRIPT, json.dumps(lines)]
    done = subprocess.run(command, cwd=ROOT, env={"COLUMNS": "110"}, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    ended, imported = json.loads(done.stdout)
    return {" ".join(line): tuple(result) for line, result in zip(lines, ended)}, imported


def test_help_and_mistakes_import_nothing_heavy(without_the_library):
    assert HEAVY.isdisjoint(without_the_library[1])


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_fits_on_a_screen(without_the_library, arguments):
    code, printed = without_the_library[0][" ".join(arguments)]
    assert code == 0 and printed.startswith("usage: clip-prompt ")
    assert len(printed.splitlines()) <= 45 and max(map(len, printed.splitlines())) <= 120
    assert "clip-prompt " in printed.partition("\n")[2]  # an example


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(without_the_library, arguments, message):
    code, printed = without_the_library[0][" ".join(arguments)]
    assert message in code and "\n" not in code and not printed


def run(*arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(arguments)
    return printed.getvalue()


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_not_zero(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 1 and capsys.readouterr().out == run("--help")
    assert all(f"\n  {name} " in run("--help") for name in COMMANDS)


def test_the_version_is_that_of_the_library(monkeypatch):
    monkeypatch.setattr("clip_prompt_cli.main.version", lambda name: f"1.2 of {name}")
    assert run("--version") == "clip-prompt 1.2 of clip_prompt_peft\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_arguments(monkeypatch, name):
    got = []
    monkeypatch.setenv("TQDM_DELAY", "5")  # what the user sets stays
    monkeypatch.setattr(f"clip_prompt_peft.commands.{name.replace('-', '_')}.main", got.extend)
    needed = {"report": ["a"], **dict.fromkeys(("predict", "export", "convert-open-clip"), ["a", "b"])}.get(name, [])
    needed = ["a", "b", "--base-model-name-or-path", "c"] if name == "convert" else needed
    main([name, *needed])
    assert got == needed and os.environ["TQDM_DELAY"] == "5"


def test_a_command_in_a_message_can_be_typed():
    assert command_line("predict", "my out/seed1", "IMAGE ...") == "clip-prompt predict 'my out/seed1' IMAGE ..."


def test_a_reader_that_goes_is_no_error():
    script = (
        "import sys, types; from clip_prompt_cli.main import main\n"
        "lines = types.SimpleNamespace(main=lambda arguments: [print('x' * 9999) for _ in range(999)])\n"
        "sys.modules['clip_prompt_peft.commands.demo'] = lines; main(['demo'])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as program:
        program.stdout.read(1)
        program.stdout.close()
        assert (program.wait(timeout=60), program.stderr.read()) == (141, b"")
