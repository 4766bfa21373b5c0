"""The benchmarks run, on models that are too small to say anything, and print their tables."""

import re
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(module, monkeypatch, capfd, *arguments):
    """The cells of the printed table, the header left out."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    module.main()
    rows = [line.strip("|").split("|") for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_step_time(monkeypatch, capfd):
    import step_time

    rows = run(
        step_time, monkeypatch, capfd, "--size", "tiny", "--classes", "5", "--context", "2", "4", "--repeats", "1"
    )
    assert len(rows) == len(step_time.WAYS)
    assert all(re.fullmatch(r"\d+\.\d{3} \(\d+\.\dx\)", cell) for row in rows for cell in row[1:])


def test_step_time_in_lower_precision(monkeypatch, capfd):
    import step_time

    ways = ["ours", "bf16"]
    rows = run(
        step_time, monkeypatch, capfd, "--size", "tiny", "--classes", "5", "--context", "2", "--repeats", "1",
        "--ways", *ways
    )  # fmt: skip
    assert len(rows) == len(ways)


def test_memory(monkeypatch, capfd):
    import memory

    monkeypatch.setattr(memory, "measure_in_process", memory.measure)  # starting processes takes its time
    # more than 256 classes go in chunks
    rows = run(
        memory, monkeypatch, capfd, "--size", "tiny", "--classes", "300", "2000", "--context", "2", "--repeats", "0"
    )
    assert [row[2] == "-" for row in rows] == [True, True, False]
    assert all(re.fullmatch(r"\d+\.\d\d s, [\d,]+ MiB", row[1]) for row in rows)


def test_scale(monkeypatch, capfd):
    import scale

    rows = run(scale, monkeypatch, capfd, "--size", "tiny", "--classes", "5", "--processes", "2", "--repeats", "1")
    assert len(rows) == len(scale.WAYS)
    assert all(re.fullmatch(r"\d+\.\d\d s", row[1]) for row in rows)


def test_end_to_end_reaches_the_same_accuracy_every_way(monkeypatch, capfd):
    import end_to_end

    rows = run(end_to_end, monkeypatch, capfd, "--epochs", "1")
    assert len({row[-1] for row in rows}) == 1


def test_side_by_side(monkeypatch, capfd):
    import side_by_side

    monkeypatch.setenv("EPOCHS", "1")
    rows = run(side_by_side, monkeypatch, capfd, "--repeats", "1")
    assert [row[0] for row in rows] == list(side_by_side.PROGRAMS.values())
    lines, bytes_saved = ([int(row[column].replace(",", "")) for row in rows] for column in (1, 3))
    assert lines[-1] < min(lines[:-1])
    assert all(0 < size < 10_000 for size in bytes_saved)


def test_only_lines_with_code_are_counted():
    import side_by_side

    assert side_by_side.count_lines('"""Docs\nof it."""\n\n# why\nx = 1\n\ndef f():\n    "More."\n    return x\n') == 3


def test_cost_model(monkeypatch, capfd):
    import cost_model

    rows = run(cost_model, monkeypatch, capfd, "--size", "tiny", "--classes", "10", "1000", "--context", "2")
    assert [row[0] for row in rows] == ["CoOp: 77 tokens", "cut after the longest", "ours"]
    assert rows[0][1].startswith("770 tokens")


def test_cost_model_counts_the_tokens_that_are_packed(tokenizer):
    import common
    import cost_model

    from clip_prompt_peft.text.packing import pack_rows

    for num_classes in (100, 512):
        classifier = common.build_classifier(num_classes, "tiny")
        shared, suffixes, longest = common.describe_prompts(classifier)
        tokens, _ = cost_model.count_tokens(num_classes, shared, suffixes / num_classes, longest)["ours"]
        parts = torch.arange(num_classes).split(num_classes if num_classes <= 256 else 128)
        prompts = classifier.class_prompts
        packed = sum(pack_rows(part, prompts, shared, torch.device("cpu")).segment.numel() for part in parts)
        assert tokens == pytest.approx(packed, rel=0.05)


def test_class_names_have_as_many_tokens_as_those_of_imagenet(tokenizer):
    import common

    names = common.class_names_like_imagenet(1000, tokenizer)
    lengths = [len(ids) for ids in tokenizer(names, add_special_tokens=False)["input_ids"]]
    differing = [
        index for index, length in enumerate(lengths) if length != int(common.TOKENS_OF_IMAGENET_NAMES[index])
    ]
    assert len(set(names)) == 1000
    assert all(common.TOKENS_OF_IMAGENET_NAMES[index] == "1" for index in differing)  # there are not so many words


def test_needed_operations_can_be_counted_by_hand():
    import common

    classifier = common.build_classifier(2, "tiny")
    classifier.set_class_names(["cat", "red cat"])
    classifier.set_prompt_template("a {}.")  # [BOS] a | cat . [EOS] and [BOS] a | red cat . [EOS]
    per_token = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # weights of two layers
    assert common.describe_prompts(classifier) == (2, 7, 6)
    assert common.needed_flops(classifier) == 2 * 2 * per_token * 9


def test_leaks(monkeypatch, capfd):
    import leaks

    rows = run(leaks, monkeypatch, capfd, "--cycles", "2", "--forwards", "4", "--trainings", "1")
    assert [row[1] for row in rows] == ["1", "2", "1", "2", "3", "4", "1"]


def test_serve_load_finds_every_answer_right(monkeypatch, capfd):
    pytest.importorskip("uvicorn")
    import serve_load

    rows = run(serve_load, monkeypatch, capfd, "--requests", "60", "--threads", "4")
    kinds = [row for row in rows if row[0] in serve_load.KINDS]
    assert kinds and all(row[1] == row[2] for row in kinds)
