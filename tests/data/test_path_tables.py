"""Local folders by name, and tables that list image files: metadata of folders, csv, tsv and jsonl files."""

import pandas as pd
import pytest
from datasets import Dataset
from PIL import Image

from clip_prompt_peft.data import load_image_dataset


pytestmark = pytest.mark.usefixtures("own_datasets_cache")

TABLE = pd.DataFrame({"file_name": ["1.png", "2.png"], "label": ["cat", "NA"]})  # "NA" is a class here
WRITERS = {
    ".csv": lambda table, file: table.to_csv(file, index=False),
    ".tsv": lambda table, file: table.to_csv(file, index=False, sep="\t"),
    ".jsonl": lambda table, file: table.to_json(file, orient="records", lines=True),
    ".parquet": lambda table, file: table.to_parquet(file),
}


def write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path)
    return root


def classes(dataset):
    return [dataset.features["label"].names[label] for label in dataset["label"]]


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos [1]", "1.png", "2.png")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_metadata_of_a_folder(photos, ending):
    WRITERS[ending](TABLE, photos / f"metadata{ending}")
    for splits in (load_image_dataset(folders={"train": photos}), load_image_dataset(str(photos))):
        assert classes(splits["train"]) == ["cat", "NA"] and splits["train"][1]["image"].size == (4, 4)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("column", ["file_name", "path", "photo"])
def test_files_of_paths_that_are_relative_to_their_folder(photos, ending, column):
    file = photos / f"labels{ending}"
    WRITERS[ending](TABLE.rename(columns={"file_name": column}), file)
    named = {"image_column": "photo"} if column == "photo" else {}
    assert classes(load_image_dataset(files={"train": file}, **named)["train"]) == ["cat", "NA"]


def test_images_that_no_row_lists_and_repeated_ones_are_told(photos, caplog):
    write(photos, "3.png")
    pd.concat([TABLE, TABLE[:1]]).to_csv(photos / "metadata.csv", index=False)
    assert len(load_image_dataset(folders={"train": photos})["train"]) == 3
    assert "1 images in" in caplog.text and "3.png': no metadata file lists them" in caplog.text
    assert "lists 1 images more than once" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,label\n1.png,cat\n3.png,dog\n", "1 of the 2 images .* do not exist, such as .*3.png"),
        ("file_name,label\n1.png,cat\n,dog\n", "1 rows of .* have no path in 'file_name', such as row 1"),
        ("file_name;label\n1.png;cat\n", r"needs a column 'file_name'.*file_name;label"),
        ("file_name\n1.png\n", "has no column of class names"),
        ("file_name,label\n1.png,0\n2.png,1\n", "numbers alone do not say"),
        ("", "Cannot read .*metadata.csv"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(photos, content, message):
    (photos / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(folders={"train": photos})


def test_metadata_in_one_of_two_folders(photos, tmp_path):
    TABLE.to_csv(photos / "metadata.csv", index=False)
    test = write(tmp_path / "test", "cat/1.png", "NA/1.png")
    with pytest.raises(ValueError, match="test has none"):
        load_image_dataset(folders={"train": photos, "test": test})


@pytest.mark.parametrize("builder", [None, "imagefolder"])
def test_a_local_folder_of_classes_loses_none(tmp_path, builder):
    write(tmp_path, "photos/cat/1.png", "photos/dog/1.png", "elsewhere/1.png")
    (tmp_path / "photos/bird").symlink_to(tmp_path / "elsewhere")
    folder = str(tmp_path / "photos")
    name, settings = (builder, {"data_dir": folder}) if builder else (folder, {})
    assert classes(load_image_dataset(name, **settings)["train"]) == ["bird", "cat", "dog"]
    stream = load_image_dataset(name, streaming=True, **settings)["train"]
    assert [example["label"] for example in stream] == [0, 1, 2]
    (tmp_path / "photos/owl").mkdir()
    with pytest.raises(ValueError, match="have no images of a known ending: owl"):
        load_image_dataset(name, **settings)


def test_a_local_folder_of_splits(tmp_path):
    folder = tmp_path / "photos"
    write(folder, *(f"{split}/{name}/1.png" for split in ("Training", "val", "test") for name in ("cat", "dog")))
    assert set(load_image_dataset(str(folder))) == {"train", "validation", "test"}
    write(folder, "dev/cat/1.png")
    with pytest.raises(ValueError, match="two folders for the split 'validation', dev and val"):
        load_image_dataset(str(folder))


def test_a_local_folder_of_rows_is_read_by_datasets(tmp_path):
    write(tmp_path, "cover.png")
    rows = {"image": [{"bytes": (tmp_path / "cover.png").read_bytes(), "path": None}] * 2, "label": ["cat", "dog"]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    assert classes(load_image_dataset(str(tmp_path))["train"]) == ["cat", "dog"]
