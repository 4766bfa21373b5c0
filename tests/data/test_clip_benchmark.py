"""Tests of datasets in the layout of CLIP_benchmark."""

import io
import tarfile

import pytest
from PIL import Image

from clip_prompt_peft.data import load_clip_benchmark, load_image_dataset, read_clip_benchmark_templates


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def write_shard(path, labels, label_file="cls", image_format="webp"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (label, 0, 0)).save(image, image_format, lossless=True)
            for ending, content in ((image_format, image.getvalue()), (label_file, str(label).encode())):
                info = tarfile.TarInfo(f"{path.stem}-{index:03}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pets [1]").mkdir()
    (tmp_path / "pets [1]/classnames.txt").write_text("pug\nsphynx cat\nbeagle\n")
    (tmp_path / "pets [1]/zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return tmp_path / "pets [1]"


def test_shards_become_splits_with_named_labels(folder):
    write_shard(folder / "train/0.tar", [2, 0])
    write_shard(folder / "train/1.tar", [1])
    write_shard(folder / "test/0.tar", [1, 1])
    splits = load_image_dataset(webdataset_dir=str(folder))
    assert splits["train"]["label"][:] == [2, 0, 1]
    assert splits["train"].features["label"].names == ["pug", "sphynx cat", "beagle"]
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"][0]["image"].getpixel((0, 0)) == (2, 0, 0)
    assert len(splits["test"]) == 2


def test_a_dataset_without_training_split_is_read(folder):
    write_shard(folder / "test/0.tar", [0, 1])
    assert list(load_clip_benchmark(folder)) == ["test"]


def test_templates_are_read_with_the_placeholder_of_this_package(folder):
    assert read_clip_benchmark_templates(folder) == ["a photo of a {}.", "{}"]


def test_files_that_an_editor_began_with_a_mark_are_read_without_it(folder):
    for file in folder.glob("*.txt"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    write_shard(folder / "test/0.tar", [0])
    assert load_clip_benchmark(folder)["test"].features["label"].names == ["pug", "sphynx cat", "beagle"]
    assert read_clip_benchmark_templates(folder) == ["a photo of a {}.", "{}"]


def test_repeated_class_names_are_numbered_with_a_warning(folder, caplog):
    (folder / "classnames.txt").write_text("missile\nsunglasses\nmissile\n")
    write_shard(folder / "test/0.tar", [2])
    test = load_clip_benchmark(folder)["test"]
    assert test.features["label"].names == ["missile", "sunglasses", "missile (2)"]
    assert "['missile'] are there more than once" in caplog.text


def test_missing_files_and_labels_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="no tar files"):
        load_clip_benchmark(folder)
    with pytest.raises(ValueError, match="no classnames.txt in"):
        load_clip_benchmark(tmp_path)
    write_shard(folder / "test/0.tar", [0, 3])
    with pytest.raises(ValueError, match="label 3, but classnames.txt has 3 names"):
        load_clip_benchmark(folder)
    write_shard(folder / "test/0.tar", [0, 1], label_file="txt")
    with pytest.raises(ValueError, match="no labels .'cls'.; its files are webp, txt"):
        load_clip_benchmark(folder)
