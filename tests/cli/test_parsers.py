"""The declarations of arguments are those of the library: what help and quick checks say cannot differ from it."""

import argparse
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from clip_prompt_cli.fields import METHODS, METRICS, STYLES, TEST_TIME
from clip_prompt_cli.parsers import (
    DATACLASSES,
    FIRST,
    HELP_ALL,
    MORE,
    check,
    field_names,
    flags_of,
    parser_of,
    with_underscores,
)
from clip_prompt_peft import PRESETS
from clip_prompt_peft.commands.arguments import parser as train_parser
from clip_prompt_peft.commands.benchmark import BenchmarkArguments, TrainingSettings
from clip_prompt_peft.commands.common import DataclassParser
from clip_prompt_peft.commands.data import DataArguments
from clip_prompt_peft.commands.test_time import TDA
from clip_prompt_peft.data.known_datasets import STYLES as STYLES_THAT_THERE_ARE
from clip_prompt_peft.evaluation.metrics import compute_metrics
from clip_prompt_peft.training.configs import PEFT_METHODS
from clip_prompt_peft.training.test_time import OBJECTIVES


PARSERS = {
    "train": train_parser,
    "report": lambda: DataclassParser((DataArguments,)),
    "benchmark": lambda: DataclassParser((BenchmarkArguments, TrainingSettings)),
}


def options_of(parser):
    """The choices of each flag of a parser, and whether it takes one value, several or none."""
    return {flag: (action.choices, action.nargs) for action in parser._actions for flag in action.option_strings}


def test_the_tables_are_those_of_the_library():
    assert set(METHODS) == {*PRESETS, *PEFT_METHODS}
    assert STYLES == STYLES_THAT_THERE_ARE
    assert (*OBJECTIVES, TDA) == TEST_TIME


@pytest.mark.parametrize("name", DATACLASSES)
def test_a_quick_check_knows_every_flag_and_no_other(name):
    of_library = {flag.replace("-", "_").lstrip("_") for flag in options_of(PARSERS[name]())} - {"h"}
    known = flags_of(name) - {"h"}
    if name == "report":
        of_library |= {"base", "base_revision", "device", "split", "output"}
    assert {flag for flag in of_library if not flag.startswith("no_")} - known == set()
    internal = {field.name for field in fields(TrainingArguments) if not field.init}
    assert known - of_library - internal == set()


@pytest.mark.parametrize("name", DATACLASSES)
def test_choices_and_numbers_of_values_are_those_of_the_library(name):
    of_library, quick = options_of(PARSERS[name]()), options_of(parser_of(name))
    shared = set(quick) & set(of_library) - {"-h", "--help", "--help_all"}
    assert len(shared) >= 8
    assert {flag: quick[flag] for flag in shared} == {flag: of_library[flag] for flag in shared}


@pytest.mark.parametrize("name", MORE)
def test_fields_are_found_without_importing_their_class(name):
    of_type = {"train": TrainingArguments, "benchmark": TrainingSettings}[name]
    assert {field.name for field in fields(of_type) if field.init} <= field_names(*MORE[name])


def test_without_the_source_of_a_class_nothing_is_refused(monkeypatch):
    monkeypatch.setitem(MORE, "train", ("transformers", "gone.py", "TrainingArguments"))
    assert check("train", ["--anything", "3"]) == ["--anything", "3"]


@pytest.mark.parametrize("name", FIRST)
def test_all_arguments_are_shown_on_demand(name, capsys):
    with pytest.raises(SystemExit) as exit:
        if name in MORE:
            assert check(name, [HELP_ALL]) == [HELP_ALL]  # for the library, which has more
            PARSERS[name]().parse_args([HELP_ALL])
        else:
            check(name, [HELP_ALL])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{flag}" in printed for flag in flags_of(name) if len(flag.strip("_")) > 1 and flag != "help_all")


def test_flags_may_be_written_with_dashes():
    parsed = parser_of("predict").parse_args(with_underscores(["a", "--top-k=2", "--", "--an-image.jpg"]))
    assert (parsed.top_k, [str(path) for path in parsed.images]) == (2, ["--an-image.jpg"])
    given = ["--train-dir", "photos", "--max-steps", "-1", "--no-dataloader-pin-memory"]
    assert check("train", given) == given


def test_metrics_are_those_that_are_computed():
    import numpy as np
    from transformers import EvalPrediction

    assert set(METRICS) <= set(compute_metrics(EvalPrediction(np.eye(6), np.arange(6))))


def test_every_declared_argument_has_a_help():
    for name in (*DATACLASSES, "predict", "export", "serve", "demo", "convert", "convert-open-clip"):
        for action in parser_of(name, show_all=True)._actions:
            assert action.help, (name, action.dest)
            assert action.help != argparse.SUPPRESS or action.dest in ("help", "help_all")
