"""Tests of `train --calibrate` and `predict --coverage`."""

import json
import re

import pytest
from conftest import TINY_CLIP
from huggingface_hub import ModelCard
from running_commands import write_image_folder

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.evaluation.conformal import ConformalClassifier


CLASSES = ("food", "clock", "hand")
TUNE = ["--model_name_or_path", TINY_CLIP, "--shots", 2, "--max_steps", 2, "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for split, source, number in (("train", "train", 3), ("validation", "test", 8), ("test", "train", 6)):
        write_image_folder(folder / split, CLASSES, number, split=source)
    return folder


def tune(run_here, photos, *arguments, splits=("train", "validation", "test")):
    sources = [word for split in splits for word in (f"--{split}_dir", photos / split)]
    return run_here("train", *TUNE, *sources, "--output_dir", "out", *arguments)


@pytest.mark.slow
def test_an_adapter_is_calibrated_on_validation_images_and_answers_with_sets(run_here, photos, tmp_path):
    printed = tune(run_here, photos, "--calibrate", "true", "--num_seeds", 2)
    number = len(list((photos / "validation").glob("*/*")))
    half = (number + 1) // 2
    assert number == 24  # all of them, and not as many as there are shots
    found = re.findall(rf"^Temperature (\S+), of {half} validation images: calibration error", printed, re.MULTILINE)
    assert len(found) == printed.count(f"Sets of classes, of {number - half} other images: coverage up to 92.3%") == 2
    config = json.loads((tmp_path / "out/seed1/adapter_config.json").read_text())
    assert f"{config['temperature']:.3g}" == found[0] and config["conformal_scores"]["num_images"] == number - half

    model = AutoPeftModelForPromptClassification.from_pretrained("out/seed1")
    pictures = sorted((photos / "test").glob("*/*"))
    sets = ConformalClassifier(model).predict_set(pictures, coverage=0.8)
    lines = run_here("predict", "out/seed1", photos / "test", "--coverage", 0.8).splitlines()
    assert lines[0].split("  ")[0] == "image" and lines[0].endswith("set of classes")
    shown = {line.split()[0]: re.findall(r"(\w+ emoji) [\d.]+%", line) for line in lines[2:]}
    assert shown == {str(picture): names for picture, names in zip(pictures, sets.names)}

    text = re.sub(" +", " ", ModelCard.load("out/seed1/README.md").text)
    assert f"- Temperature, by which logits are divided: {config['temperature']:.4g}\n" in text
    assert f"On the {half} validation images that it was fitted on, the expected calibration error is" in text
    assert "On `test`, the expected calibration error is" in text
    assert "aps, scores of 12 validation images) on `test`:" in text and "| 0.90 |" in text

    report = run_here("report", "out/seed1", "--output", "report.html")
    assert "Wrote report.html" in report
    html = (tmp_path / "report.html").read_text()
    assert "<h2>Sets of classes</h2>" in html and "tuned, without the temperature" in html


def test_a_coverage_that_needs_more_images_is_told(run_here, photos, capsys):
    tune(run_here, photos, "--calibrate", "true")
    picture = next((photos / "test").glob("*/*"))
    run_here("predict", "out", picture)
    printed = run_here("predict", "out", picture, "--coverage", 0.95)
    assert all(f"{name} emoji" in printed for name in CLASSES)


def test_without_it_nothing_is_calibrated_and_sets_are_refused(run_here, photos, tmp_path):
    tune(run_here, photos)
    assert json.loads((tmp_path / "out/seed1/adapter_config.json").read_text())["temperature"] is None
    with pytest.raises(SystemExit, match="has no scores of validation images, .* or train with --calibrate true"):
        run_here("predict", "out", photos / "test", "--coverage", 0.9)
    with pytest.raises(SystemExit, match="--calibrate not given there, True here"):
        tune(run_here, photos, "--calibrate", "true")


@pytest.mark.parametrize(
    ("splits", "arguments", "message"),
    [
        (("train", "test"), [], "--calibrate needs validation images .* and there are none. Give them"),
        (("train", "validation"), [], "besides the training and the test images, and they are what is tested on"),
        (
            ("train", "validation", "test"),
            ["--method", "clip-lora"],
            "this --method trains LORA of peft, which has no",
        ),
    ],
)
def test_what_it_cannot_do_is_told_before_the_training(run_here, photos, tmp_path, splits, arguments, message):
    with pytest.raises(SystemExit, match=f"^clip-prompt train: error: .*{message}") as exit:
        tune(run_here, photos, "--calibrate", "true", *arguments, splits=splits)
    assert "\n" not in exit.value.code and not (tmp_path / "out").exists()


def test_the_embedded_pictures_have_no_validation_images(run_here):
    with pytest.raises(SystemExit, match="--calibrate needs validation images"):
        run_here("train", "--calibrate", "--max_steps", 1)


@pytest.mark.parametrize("coverage", ["0", "1", "90", "x", "nan"])
def test_a_wrong_coverage_is_told_at_once(run_here, coverage, capsys):
    with pytest.raises(SystemExit, match="--coverage: expected a number between 0 and 1, such as 0.9, got"):
        run_here("predict", "gone", "cat.jpg", "--coverage", coverage)


def test_a_number_of_labels_does_not_go_with_a_coverage(run_here, photos):
    tune(run_here, photos)
    with pytest.raises(SystemExit, match="With --coverage, the answer is a set of any size; leave out --top_k"):
        run_here("predict", "out", photos / "test", "--coverage", 0.9, "--top_k", 2)
