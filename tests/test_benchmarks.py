"""The benchmarks run, on models that are too small to say anything, and print their tables."""

import re

import pytest
import torch


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.mark.slow
def test_step_time(run_benchmark):
    import step_time

    rows = run_benchmark(step_time, "--size", "tiny", "--classes", "5", "--context", "2", "4", "--repeats", "1")
    assert len(rows) == len(step_time.WAYS)
    assert all(re.fullmatch(r"\d+\.\d{3} \(\d+\.\dx\)", cell) for row in rows for cell in row[1:])


@pytest.mark.slow
def test_step_time_in_lower_precision(run_benchmark):
    import step_time

    ways = ["ours", "bf16"]
    sizes = ["--size", "tiny", "--classes", "5", "--context", "2", "--repeats", "1"]
    rows = run_benchmark(step_time, *sizes, "--ways", *ways)
    assert len(rows) == len(ways)


@pytest.mark.slow
def test_step_time_with_a_captured_class_encoder_says_where_there_is_none(run_benchmark):
    import step_time

    sizes = ["--size", "tiny", "--classes", "5", "--context", "2", "--repeats", "1"]
    with pytest.warns(UserWarning, match="without a captured CUDA graph, since .* type 'cpu'"):
        rows = run_benchmark(step_time, *sizes, "--ways", "ours", "captured")
    assert len(rows) == 2


@pytest.mark.slow
def test_memory(monkeypatch, run_benchmark):
    import memory

    monkeypatch.setattr(memory, "measure_in_process", memory.measure)  # starting processes takes its time
    # more than 256 classes go in chunks
    rows = run_benchmark(memory, "--size", "tiny", "--classes", "300", "2000", "--context", "2", "--repeats", "0")
    assert [row[2] == "-" for row in rows] == [True, True, False]
    assert all(re.fullmatch(r"\d+\.\d\d s, [\d,]+ MiB", row[1]) for row in rows)


@pytest.mark.slow
def test_uncertainty(run_benchmark):
    import uncertainty

    rows = run_benchmark(uncertainty, "--methods", "zero-shot", "default", "--seeds", "1", "--epochs", "1")
    errors, sets = rows[:6], rows[8:]  # two tables, of which the second has its header in between
    assert [row[0] for row in errors] == ["zero-shot"] * 3 + ["default"] * 3 == [row[0] for row in sets]
    assert all(re.fullmatch(r"\d+\.\d ± 0\.0", cell) for row in (*errors, *sets) for cell in row[-2:])


def test_image_embeds(run_benchmark):
    import image_embeds

    sizes = ["--size", "tiny", "--images", "8", "--batch_size", "4", "--repeats", "1"]
    rows = run_benchmark(image_embeds, *sizes, "--workers", "0", "1", "--compute_dtype", "bfloat16")
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(re.fullmatch(r"\d+%", row[-1]) for row in rows)


@pytest.mark.slow
def test_scale(run_benchmark):
    import scale

    rows = run_benchmark(scale, "--size", "tiny", "--classes", "5", "--processes", "2", "--repeats", "1")
    assert len(rows) == len(scale.WAYS)
    assert all(re.fullmatch(r"\d+\.\d\d s", row[1]) for row in rows)


@pytest.mark.slow
def test_test_time(run_benchmark):
    import test_time

    rows = run_benchmark(test_time, "--size", "tiny", "--classes", "5", "--images", "2", "--repeats", "1")
    assert [row[0].partition(",")[0].partition(":")[0] for row in rows] == ["authors' way", "ours", "ours"]
    assert all(re.fullmatch(r"\d+\.\d{3} \(\d+\.\dx\)", cell) for row in rows for cell in row[1:])


@pytest.mark.slow
def test_test_time_styles(run_benchmark):
    import test_time_styles

    sizes = ["--seeds", "1", "--images", "3", "--views", "24", "--epochs", "1"]
    rows = run_benchmark(test_time_styles, *sizes)
    accuracies = rows[: 2 * len(test_time_styles.WAYS)]
    assert [row[1] for row in accuracies] == [*test_time_styles.WAYS] * 2
    assert all(re.fullmatch(r"\d+\.\d", cell) for row in accuracies for cell in row[2:])


def test_only_lines_with_code_are_counted():
    import side_by_side

    assert side_by_side.count_lines('"""Docs\nof it."""\n\n# why\nx = 1\n\ndef f():\n    "More."\n    return x\n') == 3


def test_cost_model(run_benchmark):
    import cost_model

    rows = run_benchmark(cost_model, "--size", "tiny", "--classes", "10", "1000", "--context", "2")
    assert [row[0] for row in rows] == ["CoOp: 77 tokens", "cut after the longest", "ours"]
    assert rows[0][1].startswith("770 tokens")


def test_cost_model_counts_the_tokens_that_are_packed(tokenizer):
    import common
    import cost_model

    from clip_prompt_peft.text.packing import pack_prompts

    for num_classes in (100, 512):
        classifier = common.build_classifier(num_classes, "tiny")
        shared, suffixes, longest = common.describe_prompts(classifier)
        tokens, _ = cost_model.count_tokens(num_classes, shared, suffixes / num_classes, longest)["ours"]
        parts = torch.arange(num_classes).split(num_classes if num_classes <= 256 else 128)
        prompts = classifier.class_prompts
        packed = sum(pack_prompts(part, prompts, shared, torch.device("cpu")).segment.numel() for part in parts)
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


def test_time_in_which_a_card_is_busy_counts_overlaps_once():
    import common

    assert common.busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert common.busy_time([]) == 0


def test_launches_are_counted_on_cards_only():
    import common

    assert common.measure_launches(lambda: None, "cpu") is None


@pytest.mark.slow
def test_lean_bases(run_benchmark):
    import lean_bases

    rows = run_benchmark(lean_bases, "--size", "tiny", "--classes", "5", "--batch-size", "2", "--repeats", "1")
    assert [row[0] for row in rows] == list(lean_bases.bases())
    assert rows[0][3] == "0.000" and all(re.fullmatch(r"\d+\.\d\d", cell) for row in rows for cell in row[4:])
