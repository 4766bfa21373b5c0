"""Tests of splits published with CoOp."""

import json
import os
from pathlib import Path

import pytest
from datasets import Image as ImageFeature
from PIL import Image

from clip_prompt_peft.data import load_image_dataset, load_zhou_split, sample_few_shot_splits


RECORDED = json.loads((Path(__file__).parent / "recorded_draws.json").read_text())
ITEMS = {
    "train": [["b/1.png", 1, "dog"], ["a/1.png", 0, "cat"], ["b/2.png", 1, "dog"]],
    "val": [["a/2.png", 0, "cat"]],
    "test": [["b/3.png", 1, "dog"]],
}


@pytest.fixture
def write(tmp_path):
    def write(items, images=True):
        for entries in items.values() if images else ():
            for path, *_ in entries:
                (tmp_path / path).parent.mkdir(exist_ok=True)
                Image.new("RGB", (4, 4), (len(path), 0, 0)).save(tmp_path / path)
        (tmp_path / "split_zhou_Mine.json").write_text(json.dumps(items))
        return tmp_path / "split_zhou_Mine.json", tmp_path

    return write


def test_keeps_the_order_of_the_file_and_names_the_labels(write):
    splits = load_zhou_split(*write(ITEMS))
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"]["label"][:] == [1, 0, 1]
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["train"][2]["image"].filename.endswith("b/2.png")


def test_is_a_source_of_load_image_dataset(write):
    split_file, image_dir = write(ITEMS)
    splits = load_image_dataset(zhou_split=str(split_file), image_dir=str(image_dir))
    assert splits["test"].features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match="go together"):
        load_image_dataset(zhou_split=str(split_file))


@pytest.mark.parametrize("draw", RECORDED["draws"], ids=lambda d: "{seed}-{num_shots}-{when_fewer}".format(**d))
def test_the_few_shot_draw_of_a_published_split_is_that_of_coop(write, draw):
    items = {
        split: [[file, label, file.split("_")[0]] for file, label in RECORDED[name]]
        for split, name in (("train", "train"), ("val", "validation"))
    }
    splits = load_zhou_split(*write(items))
    settings = {key: draw[key] for key in ("num_shots", "seed", "when_fewer")}
    drawn = sample_few_shot_splits(splits["train"], splits["validation"], **settings)
    for few, expected in zip(drawn, (draw["train"], draw["validation"])):
        files = [
            os.path.basename(image["path"]) for image in few.cast_column("image", ImageFeature(decode=False))["image"]
        ]
        assert files == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"val": []}, "no split 'train'"),
        ([], "no split 'train'"),
        ({"train": [["a.png", "0", "cat"]]}, r"entry \['a.png', '0', 'cat'\] in 'train'"),
        ({"train": [["a.png", 0, "cat"], ["b.png", 0, "dog"]]}, r"label 0 both 'cat' and 'dog' \(b.png\)"),
        ({"train": [["a.png", 0, "cat"], ["b.png", 2, "dog"]]}, r"without gaps, got \[0, 2\]"),
        ({"train": [["a.png", 0, "cat"], ["b.png", 1, "cat"]]}, "same class name"),
        ({"train": [["gone.png", 0, "cat"]]}, "1 images .* such as 'gone.png'"),
        ({"train": [["../secret.png", 0, "cat"]]}, "such as '../secret.png'"),
        ({"train": [["/etc/hostname", 0, "cat"]]}, "such as '/etc/hostname'"),
    ],
)
def test_a_malformed_file_is_an_error(write, items, message):
    with pytest.raises(ValueError, match=message):
        load_zhou_split(*write(items, images=False))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gone.json.*does not exist"):
        load_zhou_split(tmp_path / "gone.json", tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a json file"):
        load_zhou_split(tmp_path / "bad.json", tmp_path)
