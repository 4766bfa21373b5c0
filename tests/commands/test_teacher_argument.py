"""`train --method promptkd --teacher ...`: what is learned from, and what is refused."""

import json

import pytest
from conftest import TINY_CLIP
from peft import PeftModel
from running_commands import write_image_folder

from clip_prompt_peft import CLIPForPromptClassification


def train(run_here, images, *arguments):
    common = ["--model_name_or_path", TINY_CLIP, "--train_dir", images, "--shots", 4, "--disable_tqdm", "true"]
    return run_here("train", *common, "--max_steps", 2, *arguments)


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=6)


@pytest.mark.slow
def test_an_adapter_of_another_training_is_the_teacher(run_here, images, tmp_path):
    train(run_here, images, "--method", "ivlp", "--output_dir", "teacher")
    for augment in ("false", "true"):
        arguments = ("--teacher", "teacher", "--output_dir", f"out-{augment}", "--augment", augment)
        printed = train(run_here, images, "--method", "promptkd", *arguments)
        assert "Teacher    teacher, from whose answers it learns instead of labels" in printed
    folder = tmp_path / "out-false/seed1"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["teacher_class_names"] == config["class_names"] == ["clock emoji", "food emoji"]
    names = config["class_names"]
    student, teacher = (
        PeftModel.from_pretrained(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names), path)
        for path in (folder, tmp_path / "teacher/seed1")
    )
    assert student.get_class_embeds().allclose(teacher.eval().get_class_embeds(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "promptkd"],
            "--method promptkd learns from a teacher instead of labels; name one with --teacher",
        ),
        (["--method", "ivlp", "--teacher", TINY_CLIP], "is for --method promptkd only, got --method ivlp"),
        (["--method", "promptkd", "--teacher", "./nowhere"], "There is no folder './nowhere'"),
        (["--method", "promptkd", "--teacher", "images/nowhere"], "There is no folder 'images/nowhere'; in "),
        (
            ["--method", "promptkd", "--teacher", TINY_CLIP, "--num_virtual_tokens", "2"],
            "set --num_virtual_tokens 0, got 2",
        ),
        (
            ["--method", "promptkd", "--teacher", TINY_CLIP, "--label_smoothing_factor", "0.1"],
            "leave out --label_smoothing_factor",
        ),
    ],
)
def test_a_teacher_belongs_to_its_method(run_here, images, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(run_here, images, *arguments, "--output_dir", "out")
