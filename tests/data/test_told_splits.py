"""Splits that folders and columns name, and images that are in two of them."""

import re
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_CLIP
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage

from clip_prompt_peft.data import hold_out, load_image_dataset, shared_images


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def picture(value, size=8):
    return PILImage.fromarray(np.random.default_rng(value).integers(0, 255, size=(size, size, 3), dtype=np.uint8))


def write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(abs(hash(path)) % 10_000).save(root / path)
    return root


def classes(*folders, names=("cat", "dog")):
    return [f"{folder}/{name}/{number}.png" for folder in folders for name in names for number in range(2)]


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("seg_train", "seg_test", "test"),
        ("images_train", "images_val", "validation"),
        ("training_set", "test_set", "test"),
        ("Train 2017", "Dev", "validation"),
        ("training", "testing", "test"),
        ("train", "valid", "validation"),
    ],
)
def test_folders_of_splits_are_recognized_as_datasets_does_it(tmp_path, caplog, train, test, split):
    write(tmp_path, *classes(train, test))
    splits = load_image_dataset(str(tmp_path))
    assert {name: len(images) for name, images in splits.items()} == {"train": 4, split: 4}
    assert all(
        f"/{train}/" in image["path"] for image in splits["train"].cast_column("image", Image(decode=False))["image"]
    )
    exact = {train, test} <= {"train", "valid", "training", "testing"}
    assert exact or f"{test}' is {split}" in caplog.text
    flag = f"--{split}_dir '{tmp_path}/{test}'"
    with pytest.raises(ValueError, match=re.escape(f"--train_dir '{tmp_path}/{train}' {flag}")):
        load_image_dataset(folders={"train": tmp_path})


def test_folders_of_splits_beside_others_are_an_error_that_names_the_flags(tmp_path):
    write(tmp_path, *classes("seg_train", "seg_test"), "seg_pred/1.png")
    expected = f"--train_dir '{tmp_path}/seg_train' --test_dir '{tmp_path}/seg_test'"
    for arguments in ({"dataset_name": str(tmp_path)}, {"folders": {"train": tmp_path}}):
        with pytest.raises(ValueError, match="seg_pred") as error:
            load_image_dataset(**arguments)
        assert expected in str(error.value)


def test_classes_that_are_called_like_splits_are_classes(tmp_path, caplog):
    write(tmp_path, *classes(".", names=("bullet train", "test tube", "dev board")))
    assert load_image_dataset(str(tmp_path))["train"].features["label"].num_classes == 3
    assert not caplog.records


def test_folders_with_the_same_classes_are_told_with_the_flags(tmp_path, caplog):
    write(tmp_path, *classes("fold1", "fold2", "fold3"))
    assert len(load_image_dataset(str(tmp_path))["train"]) == 12
    assert "such as 'fold1' and 'fold2' the class 'cat' (2 classes of 3 folders)" in caplog.text
    assert "--train_dir, --test_dir" in caplog.text


@pytest.fixture
def table(tmp_path):
    write(tmp_path, *(f"{number}.png" for number in range(8)))
    return pd.DataFrame({"file_name": [f"{number}.png" for number in range(8)], "label": ["cat", "dog"] * 4})


@pytest.mark.parametrize("column", ["split", "Subset", "what it is for"])
@pytest.mark.parametrize("file", ["all.csv", "all.parquet", "metadata.csv"])
def test_a_column_of_splits_divides_a_table(tmp_path, table, caplog, column, file):
    table[column] = ["train", "train ", "VAL", "val", "test", "test", "train", "train"]
    (table.to_parquet if file.endswith("parquet") else table.to_csv)(tmp_path / file, index=False)
    metadata = file == "metadata.csv"
    splits = load_image_dataset(str(tmp_path)) if metadata else load_image_dataset(files={"train": tmp_path / file})
    assert {name: len(images) for name, images in splits.items()} == {"train": 4, "validation": 2, "test": 2}
    assert f"The column '{column}' divides the images: train (4), validation (2), test (2)." in caplog.text
    assert splits["test"].column_names == ["image", "label"] or splits["test"].column_names == ["label", "image"]
    assert splits["test"][0]["image"].tobytes() == PILImage.open(tmp_path / "4.png").tobytes()


def test_a_column_of_class_labels_divides_images(tmp_path):
    types = Features({"image": Image(), "label": Value("string"), "split": ClassLabel(names=["test", "train"])})
    columns = {"image": [picture(i) for i in range(4)], "label": ["a", "b"] * 2, "split": [1, 1, 0, 0]}
    Dataset.from_dict(columns, features=types).to_parquet(tmp_path / "all.parquet")
    assert {
        name: len(of_split) for name, of_split in load_image_dataset(files={"train": tmp_path / "all.parquet"}).items()
    } == {
        "train": 2,
        "test": 2,
    }


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("split", ["train", "trainval"], "'trainval'"),
        ("split", ["train", None], "None"),
        ("split", ["test", "val"], "'test'"),
        ("fold", [1, 2], "'1', '2'"),
        ("is_valid", [True, False], "'True', 'False'"),
    ],
)
def test_other_columns_are_named_with_what_to_do(tmp_path, table, caplog, column, values, told):
    table[column] = pd.Series(values * 4, dtype=object)
    table.to_csv(tmp_path / "all.csv", index=False)
    splits = load_image_dataset(files={"train": tmp_path / "all.csv"})
    assert list(splits) == ["train"] and len(splits["train"]) == 8
    assert f"The column '{column}' is not used" in caplog.text and told in caplog.text and "--test_file" in caplog.text


@pytest.mark.parametrize("values", [["train"] * 8, ["x", "y"] * 4])
def test_a_column_that_is_the_label_or_says_nothing_is_not_told(tmp_path, table, caplog, values):
    table["split"] = values
    table.to_csv(tmp_path / "all.csv", index=False)
    named = {} if values[0] == "train" else {"label_column": "split"}
    assert len(load_image_dataset(files={"train": tmp_path / "all.csv"}, **named)["train"]) == 8
    assert not caplog.records


def test_splits_that_contradict_a_column_are_told(tmp_path, table, caplog):
    table["split"] = ["train", "test"] * 4
    table["label"] = ["cat"] * 4 + ["dog"] * 4
    table.to_csv(tmp_path / "all.csv", index=False)
    load_image_dataset(files={"train": tmp_path / "all.csv", "test": tmp_path / "all.csv"})
    assert "The column 'split' says that 4 of the 8 images of 'train' are of the split 'test'" in caplog.text


def test_a_column_of_a_stream_is_told(tmp_path, caplog):
    types = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "split": Value("string")})
    columns = {"image": [picture(i) for i in range(4)], "label": [0, 1] * 2, "split": ["train", "test"] * 2}
    Dataset.from_dict(columns, features=types).to_parquet(tmp_path / "all.parquet")
    load_image_dataset(files={"train": tmp_path / "all.parquet"}, streaming=True)
    assert "The column 'split' of a stream is not used" in caplog.text


def encoded(image, **settings):
    buffer = BytesIO()
    image.save(buffer, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def images(records):
    types = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": records, "label": [0] * len(records)}, features=types)


def test_images_that_are_in_both_are_found_by_bytes_and_by_pixels():
    train = images([encoded(picture(i), format="PNG") for i in range(6)])
    again = [encoded(picture(3), format="BMP"), encoded(picture(9), format="PNG"), encoded(picture(1), format="PNG")]
    assert shared_images(train, images(again)).rows == [(0, 3), (2, 1)]
    by_bytes = shared_images(train, images(again), max_decoded=0)
    assert by_bytes.rows == [(2, 1)] and by_bytes.names == [("row 2", "row 1")] and by_bytes.num_skipped == 0


def test_of_large_data_what_was_not_compared_is_counted(tmp_path):
    train = images([encoded(picture(i, size=8 + 8 * i), format="PNG") for i in range(4)])
    test = concatenate_datasets([train, train.select([0, 1])])
    everything = shared_images(train, test, max_decoded=0)
    assert [row for row, _ in everything.rows] == list(range(6)) and everything.num_skipped == 0
    smallest = len(train.cast_column("image", Image(decode=False))[0]["image"]["bytes"])
    some = shared_images(train, test.flatten_indices(), max_decoded=0, max_read=3 * (smallest + 2**14))
    assert [row for row, _ in some.rows] == [0, 4] and some.num_skipped == 3 + 4
    chosen = shared_images(train.select([0, 2]), test, max_decoded=0, max_read=1)
    assert chosen.rows == [] and chosen.num_skipped == 2


def test_unreadable_and_remote_images_are_left_to_those_who_use_them(tmp_path):
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    paths = [
        str(tmp_path / "1.png"),
        str(tmp_path / "bad.png"),
        "https://localhost:9/1.png",
        str(tmp_path / "gone.png"),
    ]
    both = images([{"path": path, "bytes": None} for path in paths])
    shared = shared_images(both, both)
    assert shared.rows == [(0, 0), (1, 1)] and shared.num_skipped == 4
    assert shared_images(both.select([0, 1]), both.select([0, 1])).rows == [(0, 0)]  # by their pixels


def test_the_command_tells_test_images_that_are_trained_on(tmp_path, run_here, caplog):
    write(tmp_path, *classes("train", "test"))
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / "test" / name).write_bytes((tmp_path / "train" / name).read_bytes())
    common = ["--model_name_or_path", TINY_CLIP, "--shots", 1, "--num_train_epochs", 1, "--output_dir", "out"]
    run_here("train", "--dataset_name", str(tmp_path), *common)
    assert "2 of the 4 images of 'test' equal training images" in caplog.text
    assert re.search(r"test/cat/0.png' \(equal to '.*/train/cat/0.png'\)", caplog.text)


def test_duplicates_that_are_drawn_apart_are_found():
    records = [encoded(picture(i // 2), format="PNG") for i in range(16)]
    train, test = hold_out(images(records), 0.5)
    assert shared_images(train, test).rows
