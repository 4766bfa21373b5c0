"""Tests of the command `benchmark`."""

import json
import re
import shutil

import pytest
from conftest import EMOJI, TINY_CLIP
from datasets import load_dataset
from PIL import Image


SHORT = ["--shots", 1, 2, "--seeds", 1, 2, "--num_train_epochs", 1]
SHORT += ["--methods", "linear-probe", "prompt-tuning", "--ensemble", "imagenet_simple"]


@pytest.mark.slow
def test_prints_and_draws_and_a_second_time_only_draws_again(run_here, tmp_path):
    printed = run_here("benchmark", *SHORT)
    folder = tmp_path / "outputs/few_shot_benchmark"
    assert re.search(r"\| method +\| 1 shot +\| 2 shots +\|", printed)
    assert re.search(r"\| linear-probe +\| [\d.]+ ± [\d.]+ +\| – +\| – +\|", printed)
    assert re.search(r"\| prompt-tuning +(\| [\d.]+ ± [\d.]+ +){4}\|", printed)  # source, two domains and their mean
    assert re.search(r"\| linear-probe +\| [\d.]+ ± [\d.]+ +\| [\d.]+ ± [\d.]+ +\| [\d.]+ ± [\d.]+ +\| \d", printed)
    assert re.search(r"\| prompt-tuning +(\| [\d.]+ ± [\d.]+ +){3}\| 512 +\| 2\.2 KB +\|", printed)
    assert (folder / "tables.md").read_text() in printed
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert {"few_shot_curve.png", "base_new.png", "confusion_linear-probe.png", "reliability_prompt-tuning.png"} <= {
        *pictures
    }
    lines = (folder / "results.jsonl").read_text()
    for path in folder.glob("*.png"):
        path.unlink()
    again = run_here("benchmark", *SHORT)
    assert re.match(
        r"The results of (\d+) of \1 runs were read from outputs/few_shot_benchmark/results.jsonl\n", again
    )
    assert again.partition("\n")[2] == printed
    assert (folder / "results.jsonl").read_text() == lines
    assert sorted(path.name for path in folder.glob("*.png")) == pictures


def test_takes_data_of_ones_own(run_here, tmp_path):
    for split in ("train", "test"):
        dataset = load_dataset("parquet", data_files=str(EMOJI / f"noto-{split}.parquet"), split="train")
        for index in range(0, len(dataset), 2):
            kind = dataset.features["label"].int2str(dataset[index]["label"])
            if kind in ("clock", "food", "hand"):
                (tmp_path / f"mine/{split}/{kind}").mkdir(parents=True, exist_ok=True)
                dataset[index]["image"].save(tmp_path / f"mine/{split}/{kind}/{index}.png")
    short = ["--shots", 2, "--seeds", 1, "--num_train_epochs", 1, "--methods", "linear-probe", "--output_dir", "out"]
    printed = run_here("benchmark", "--data", f"mine={tmp_path / 'mine'}", *short)
    assert "mine, trained on 2 images of each base class" in printed
    assert "tested elsewhere" not in printed
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--data", "pets"], "NAME=SOURCE, got 'pets'"),
        (["--ensemble", "none"], "no templates 'none'"),
        (["--metric", "speed"], "no metric 'speed'.*accuracy"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_work(run_here, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run_here("benchmark", *arguments)
    assert exit.value.code.startswith("clip-prompt benchmark: error: ")
    assert re.search(message, exit.value.code)
    assert not (tmp_path / "outputs").exists()


ZERO_SHOT = ["--shots", 1, "--seeds", 1, "--methods", "zero-shot", "--data", "mine=mine", "--output_dir", "out"]
COLORS = ("red", "green", "blue", "white")


def draw(folder, size):
    for split in ("train", "test"):
        for color in COLORS:
            (folder / split / color).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), color).save(folder / split / color / "1.png")


@pytest.mark.slow
def test_results_are_used_again_for_the_same_images_and_model_only(run_here, tmp_path):
    draw(tmp_path / "mine", 20)
    for parent in ("a", "b"):
        shutil.copytree(TINY_CLIP, tmp_path / parent / "clip")
    config = json.loads((tmp_path / "b/clip/config.json").read_text())
    (tmp_path / "b/clip/config.json").write_text(json.dumps({**config, "logit_scale_init_value": 1.0}))
    read = "were read from out/results.jsonl"
    assert read not in run_here("benchmark", *ZERO_SHOT, "--model_name_or_path", "a/clip")
    assert read in run_here("benchmark", *ZERO_SHOT, "--model_name_or_path", "a/clip")
    assert read not in run_here("benchmark", *ZERO_SHOT, "--model_name_or_path", "b/clip")
    draw(tmp_path / "mine", 21)
    assert read not in run_here("benchmark", *ZERO_SHOT, "--model_name_or_path", "a/clip")


def test_ctrl_c_ends_it_in_one_line(run_here, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    draw(tmp_path / "mine", 20)
    monkeypatch.setattr("clip_prompt_peft.protocols.Benchmark.run", stop)
    with pytest.raises(SystemExit) as exit:
        run_here("benchmark", *ZERO_SHOT)
    assert exit.value.code == 130
    expected = r"\nStopped\. 0 of \d+ runs? (is|are) done; run the same command again to go on\.\n$"
    assert re.search(expected, capsys.readouterr().err)
