"""Tests of the command `export`."""

import json

import pytest
from conftest import TINY_CLIP
from peft import get_peft_model
from PIL import Image

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


COLORS = {"red things": "red", "blue things": "blue"}


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter, beside photos of its classes."""
    for name, color in COLORS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40 + number, 30), color).save(tmp_path / "photos" / name / f"{number}.png")
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=sorted(COLORS))
    get_peft_model(model, CLIPPromptTuningConfig()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_writes_a_graph_and_compares_it_on_the_images(adapter, run_here, tmp_path):
    pytest.importorskip("onnxruntime")
    printed = run_here("export", "adapter", "my onnx", "--test_dir", "photos", "--int8")
    assert printed.startswith("Wrote my onnx: model.onnx (5.5 MB)")
    assert "on 4 images\nAccuracy with 8-bit weights: " in printed
    assert json.loads((tmp_path / "my onnx/labels.json").read_text()) == sorted(COLORS)
    assert "on random pixels\n" in run_here("export", "adapter", "my onnx")
    assert not (tmp_path / "my onnx/model_int8.onnx").exists()  # of the earlier export


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone/adapter/x", "out"], "There is no folder 'gone/adapter/x'"),
        (["adapter", "out", "--int8"], "--int8 needs --test_dir, the images on which to compare"),
        (["adapter", "out", "--test_dir", "gone"], "--test_dir: The image folder 'gone' does not exist"),
        (["adapter", "out", "--test_dir", "other"], "1 are unknown to the model .*'green things'"),
        (["adapter", "out", "--device", "cuda:99"], "--device 'cuda:99' cannot be used on this machine"),
        (["adapter", "photos/red things/0.png"], "The folder 'photos/red things/0.png' cannot be written"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_file_is_written(adapter, run_here, tmp_path, arguments, message):
    for name in ("red things", "green things"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "other" / name / "1.png")
    with pytest.raises(SystemExit, match=f"^clip-prompt export: error: .*{message}") as exit:
        run_here("export", *arguments)
    assert "\n" not in exit.value.code and not (tmp_path / "out").exists()


def test_a_missing_extra_is_told_first(adapter, run_here, monkeypatch):
    monkeypatch.setattr(
        "clip_prompt_peft.commands.common.find_spec", lambda name: None if name == "onnx" else object()
    )
    with pytest.raises(SystemExit, match="This command needs onnx; .*pip install"):
        run_here("export", "adapter", "out")


def test_an_adapter_that_depends_on_the_image_is_refused(adapter, run_here, tmp_path):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=sorted(COLORS))
    get_peft_model(model, CLIPPromptTuningConfig(image_conditioned=True)).save_pretrained(tmp_path / "conditioned")
    with pytest.raises(SystemExit, match="conditioned on the image: .* cannot be exported"):
        run_here("export", "conditioned", "out")
    assert not (tmp_path / "out").exists()
