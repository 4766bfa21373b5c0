"""`predict --test_time`: answers that are adapted to the images."""

import json

import pytest
import torch
from conftest import CLASS_NAMES, slow_param
from peft import get_peft_model
from PIL import Image

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    DynamicAdapter,
    TestTimeTuner,
)
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import RandomViews


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.effect_noise((50, 40 + index), 60 + 40 * index).convert("RGB").save(folder / f"{index}.png")
    return folder


def saved(folder, preset):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    get_peft_model(model, CLIPPromptTuningConfig.from_preset(preset, model)).save_pretrained(folder)
    return folder


def table(output):
    """The label and the probability of each image."""
    rows = [line.split() for line in output.splitlines() if ".png" in line]
    return [(label, float(probability.rstrip("%"))) for _, label, probability in rows]


def expected(kind, folder, images, image_processor):
    model = AutoPeftModelForPromptClassification.from_pretrained(folder).eval()
    opened = [Image.open(file) for file in sorted(images.iterdir())]
    if kind == "tda":
        with torch.no_grad():
            pixels = image_processor(opened, return_tensors="pt")["pixel_values"]
            embeds = model.get_base_model().get_image_features(pixels).pooler_output
        logits = DynamicAdapter.of(model)(embeds).logits
    else:
        views = RandomViews(image_processor, generator=torch.Generator().manual_seed(0))
        logits = TestTimeTuner(model, kind, views)(opened).logits
    values, labels = logits.softmax(dim=-1).max(dim=-1)
    return [(CLASS_NAMES[label], round(100 * value, 1)) for value, label in zip(values.tolist(), labels.tolist())]


@pytest.mark.parametrize("kind", ["tpt", slow_param("c-tpt"), slow_param("r-tpt"), "tda"])
def test_answers_are_adapted_to_the_images(kind, images, tmp_path, run_here, image_processor):
    adapter = saved(tmp_path / "adapter", "kgcoop")
    arguments = ("predict", adapter, images)
    found = table(run_here(*arguments, "--test-time", kind, "--batch_size", 2))
    for (label, probability), (best, value) in zip(
        found, expected(kind, adapter, images, image_processor), strict=True
    ):
        assert label == best and probability == pytest.approx(value, abs=0.11)
    assert found != table(run_here(*arguments))


def test_sets_and_temperatures_are_of_answers_without_adaptation(images, tmp_path, run_here, capsys):
    adapter = saved(tmp_path / "adapter", "kgcoop")
    with pytest.raises(SystemExit) as stopped:
        run_here("predict", adapter, images, "--test_time", "tda", "--coverage", 0.9)
    assert "leave out --test_time" in str(stopped.value.code) + capsys.readouterr().err
    before = table(run_here("predict", adapter, images, "--test_time", "tda"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "temperature": 3.0}))
    assert table(run_here("predict", adapter, images, "--test_time", "tda")) == before


def test_an_adapter_that_cannot_be_adapted_is_told_at_once(images, tmp_path, run_here, capsys):
    adapter = saved(tmp_path / "adapter", "cocoop")
    for kind, reason in (("tpt", "depend on the image"), ("tda", "for each image")):
        with pytest.raises(SystemExit) as stopped:
            run_here("predict", adapter, images, "--test_time", kind)
        told = str(stopped.value.code) + capsys.readouterr().err
        assert reason in told and "Traceback" not in told
