"""Tables of results, with numbers that can be computed by hand."""

import json

import pytest

from clip_prompt_peft.protocols import (
    Results,
    base_new_scores,
    base_new_table,
    base_to_new,
    few_shot_curve,
    few_shot_table,
    merge_runs,
    methods_table,
    transfer,
    transfer_table,
)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path, "f")


def cells(table):
    header, line, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
    assert set("".join(line)) == {"-"}
    return header, rows


def test_a_few_shot_table_has_mean_and_population_deviation_over_seeds(results):
    runs = few_shot_curve("pets", ["zero-shot", "prompt-tuning"], shots=(1, 2), seeds=(1, 2))
    for run, accuracy in zip(runs, (0.5, 0.6, 0.8, 0.9, 0.9)):
        results.add(run, {"pets": {"accuracy": accuracy}}, seconds=0)
    header, rows = cells(few_shot_table(results, runs))
    assert header == ["method", "no training", "1 shot", "2 shots"]
    assert rows == [["zero-shot", "50.0", "", ""], ["prompt-tuning", "", "70.0 ± 10.0", "90.0 ± 0.0"]]


def test_h_is_the_harmonic_mean_of_the_means(results):
    runs = base_to_new("pets", ["linear-probe", "prompt-tuning"], (16,), (1, 2))
    values = ((0.9, None), (0.8, None), (0.5, 0.2), (0.7, 0.6))
    for run, (base, new) in zip(runs, values):
        metrics = {"base": {"accuracy": base}, "new": None if new is None else {"accuracy": new}}
        results.add(run, metrics, seconds=0)
    header, rows = cells(base_new_table(results, runs))
    assert header == ["method", "base", "new", "H"]
    assert rows == [
        ["linear-probe", "85.0 ± 5.0", "–", "–"],
        ["prompt-tuning", "60.0 ± 10.0", "40.0 ± 20.0", "48.0"],
    ]
    assert "H" not in base_new_scores(results, runs)["linear-probe"]


def test_a_transfer_table_averages_over_the_targets(results):
    runs = transfer("a", ["b", "c"], ["zero-shot"])
    results.add(runs[0], {"a": {"accuracy": 1.0}, "b": {"accuracy": 0.2}, "c": {"accuracy": 0.4}}, seconds=0)
    header, rows = cells(transfer_table(results, runs))
    assert header == ["method", "a (source)", "b", "c", "mean of targets"]
    assert rows == [["zero-shot", "100.0", "20.0", "40.0", "30.0"]]


def test_a_table_of_methods_shows_other_test_sets_and_sizes(results):
    runs = transfer("a", ["b", "c"], ["zero-shot", "linear-probe", "coop"], seeds=(1, 2))
    for run, value in zip(runs, (0.2, 0.3, 0.5, 0.4, 0.6)):
        known = {"accuracy": value, "mean_class_accuracy": value + 0.1}
        other = None if run.method == "linear-probe" else {"accuracy": 1.0, "mean_class_accuracy": value / 2}
        size = {"zero-shot": (0, 0), "linear-probe": (1560, 0), "coop": (2048, 8396)}[run.method]
        results.add(run, {"a": known, "b": other, "c": other}, 0, *size)
    header, rows = cells(methods_table(Results(results.folder, "f"), runs))
    assert header == ["method", "accuracy", "class mean", "other test sets, class mean", "trained", "adapter"]
    assert rows == [
        ["zero-shot", "20.0", "30.0", "10.0", "0", "–"],
        ["linear-probe", "40.0 ± 10.0", "50.0 ± 10.0", "–", "1,560", "–"],
        ["coop", "50.0 ± 10.0", "60.0 ± 10.0", "25.0 ± 5.0", "2,048", "8.2 KB"],
    ]


def test_files_without_sizes_can_be_read(results):
    (run,) = transfer("a", ["b"], ["zero-shot"])
    results.add(run, {test: {"accuracy": 0.5, "mean_class_accuracy": 0.5} for test in run.tests}, 0, 0, 0)
    line = json.loads(results.path.read_text())
    del line["num_trainable"], line["num_bytes"]
    results.path.write_text(json.dumps(line) + "\n")
    again = Results(results.folder, "f")
    assert again.size(run) == (None, None) and not again.missing_tests(run)
    assert cells(methods_table(again, [run]))[1] == [["zero-shot", "50.0", "50.0", "50.0", "–", "–"]]


def test_runs_that_train_the_same_become_one_with_all_tests():
    curve, others = few_shot_curve("a", ["clip-lora"], (1, 16), (1,)), transfer("a", ["b"], ["clip-lora"], (16,), (1,))
    merged = merge_runs([*curve, *others])
    assert [(run.shots, run.tests) for run in merged] == [(1, ("a",)), (16, ("a", "b"))]


def test_a_method_without_training_is_run_once():
    assert [(run.shots, run.seed) for run in few_shot_curve("a", ["zero-shot"])] == [(0, 0)]
    assert len(few_shot_curve("a", ["clip-lora"])) == 5 * 3
