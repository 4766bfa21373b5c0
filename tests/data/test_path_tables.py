"""Local folders by name, and tables that list image files: metadata of folders, csv, tsv and jsonl files."""

import pandas as pd
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
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
        ("file_name/label\n1.png/cat\n", r"needs a column 'file_name'.*file_name/label"),
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


def test_a_local_folder_of_rows_is_read_by_datasets(tmp_path, caplog):
    write(tmp_path, "cover.png")
    rows = {"image": [{"bytes": (tmp_path / "cover.png").read_bytes(), "path": None}] * 2, "label": ["cat", "dog"]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    assert classes(load_image_dataset(str(tmp_path))["train"]) == ["cat", "dog"]
    assert "is read by `datasets`, since it holds" in caplog.text and "cover.png', may be left out" in caplog.text


class TestRelativePaths:
    @pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
    def test_those_in_the_folder_of_the_table_go_first(self, photos, tmp_path, monkeypatch, caplog, ending):
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (9, 9)).save("1.png")  # not this one
        file = photos / f"labels{ending}"
        WRITERS[ending](TABLE, file)
        train = load_image_dataset(files={"train": file})["train"]
        assert [image.size for image in train["image"]] == [(4, 4)] * 2 and "working directory" not in caplog.text

    def test_of_shards_in_two_folders(self, photos, tmp_path):
        other = write(tmp_path / "other", "1.png", "2.png")
        Image.new("RGB", (9, 9)).save(other / "1.png")
        files = [folder / "labels.parquet" for folder in (photos, other)]
        for file in files:
            TABLE.to_parquet(file)
        train = load_image_dataset(files={"train": files})["train"]
        assert [image.size for image in train["image"]] == [(4, 4), (4, 4), (9, 9), (4, 4)]

    @pytest.mark.parametrize("ending", [".tsv", ".parquet"])
    def test_those_of_the_working_directory_are_told(self, photos, tmp_path, monkeypatch, caplog, ending):
        monkeypatch.chdir(photos)
        file = tmp_path / f"labels{ending}"
        WRITERS[ending](TABLE, file)
        assert load_image_dataset(files={"train": file})["train"][0]["image"].size == (4, 4)
        assert "2 of the 2 images that" in caplog.text and "in the working directory, such as '1.png'" in caplog.text

    def test_missing_ones_of_a_parquet_file_are_named(self, photos):
        TABLE.replace("2.png", "gone.png").to_parquet(photos / "labels.parquet")
        with pytest.raises(ValueError, match="1 of the 2 images .* lists in 'file_name' do not exist, such as .*gone"):
            load_image_dataset(files={"train": photos / "labels.parquet"})

    @pytest.mark.parametrize("with_bytes", [False, True])
    def test_of_records(self, photos, with_bytes):
        rows = [{"bytes": None, "path": "1.png"}]
        rows += [{"bytes": (photos / "2.png").read_bytes() if with_bytes else None, "path": "2.png"}]
        pd.DataFrame({"picture": rows, "label": ["cat", "dog"]}).to_parquet(photos / "labels.parquet")
        train = load_image_dataset(files={"train": photos / "labels.parquet"})["train"]
        assert [image.size for image in train["image"]] == [(4, 4)] * 2 and classes(train) == ["cat", "dog"]

    def test_addresses_are_not_looked_for_on_the_disk(self, photos):
        TABLE.replace("2.png", "https://nowhere.invalid/2.png").to_csv(photos / "labels.csv", index=False)
        train = load_image_dataset(files={"train": photos / "labels.csv"})["train"]
        assert (
            train.cast_column("image", ImageFeature(decode=False))[1]["image"]["path"]
            == "https://nowhere.invalid/2.png"
        )


@pytest.mark.parametrize("column", ["label_column", "image_column"])
def test_the_column_of_paths_is_not_that_of_the_labels(photos, column):
    TABLE.to_csv(photos / "labels.csv", index=False)
    name = "file_name" if column == "label_column" else "label"
    with pytest.raises(ValueError, match=f"'{name}' cannot be the image column and the label column"):
        load_image_dataset(files={"train": photos / "labels.csv"}, **{column: name})
    if column == "label_column":
        (photos / "labels.csv").rename(photos / "metadata.csv")
        with pytest.raises(ValueError, match="'file_name' cannot be the image column and the label column"):
            load_image_dataset(folders={"train": photos}, label_column=name)


def test_one_metadata_file_for_the_folders_of_splits(tmp_path):
    folder = tmp_path / "photos"
    write(folder, "train/1.png", "train/sub/2.png", "Test/3.png", "other/4.png")
    rows = ["file_name,label", "train/1.png,cat", "train/sub/2.png,dog", "Test/3.png,cat"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    (folder / "other/4.png").unlink()
    splits = load_image_dataset(str(folder))
    assert {split: classes(dataset) for split, dataset in splits.items()} == {"test": ["cat"], "train": ["cat", "dog"]}


@pytest.mark.parametrize("name", ["metadata.json", "Metadata.csv", "metadata.xlsx"])
def test_a_metadata_file_of_another_name_is_mentioned(photos, name):
    (photos / name).write_text("file_name,label")
    with pytest.raises(ValueError, match=f"table metadata.csv, .* beside them; there are 1 .* files .*{name}"):
        load_image_dataset(folders={"train": photos})


def test_a_folder_is_no_file(photos):
    with pytest.raises(ValueError, match="is a folder and not a file"):
        load_image_dataset(files={"train": photos})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", b"file_name,label\n"),
        ("labels.tsv", b""),
        ("labels.jsonl", b""),
        ("labels.jsonl", b'{"file_name": "1.png", "label": "cat"},\n{"file_'),
        ("labels.parquet", b"PAR1"),
        ("labels.arrow", b""),
    ],
)
def test_files_that_cannot_be_read_are_named(photos, name, content):
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"Cannot read '.*{name}' as .*damaged, empty or of another format"):
        load_image_dataset(files={"train": photos / name})


def test_a_folder_with_an_empty_table_is_named(tmp_path):
    folder = tmp_path / "tables"  # the cache lies in tmp_path
    folder.mkdir()
    (folder / "labels.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=f"Cannot read '{folder}/labels.jsonl' as json.*empty"):
        load_image_dataset(str(folder))


def test_line_ends_quotes_and_addresses_of_files(photos):
    rows = ["file_name,label", f'"{photos}/1.png","cat, old"', f"file://{photos}/2.png,dog"]
    for line_end in ("\n", "\r\n", "\r"):
        (photos / "labels.csv").write_bytes(line_end.join(rows).encode())
        train = load_image_dataset(files={"train": photos / "labels.csv"})["train"]
        assert classes(train) == ["cat, old", "dog"] and train[1]["image"].size == (4, 4)


@pytest.mark.parametrize("name", ["metadata.csv", "labels.tsv"])
def test_names_of_long_tables_are_as_written(photos, name):
    written = ["A1"] * 10_000 + ["007"] * 5_000 + ["TRUE"] * 5_000 + ["1.10"] * 400
    table = pd.DataFrame({"file_name": "1.png", "label": written})
    WRITERS[name[-4:]](table, photos / name)
    splits = (
        load_image_dataset(str(photos))
        if name == "metadata.csv"
        else load_image_dataset(files={"train": photos / name})
    )
    assert classes(splits["train"]) == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'file_name,label\n1.png,"cat\n1.png,cat\n2.png,dog"\n2.png,owl\n',
            "1 of 2 rows .*'label', such as row 0: 'cat",
        ),
        ('label,file_name\ncat,2.png\ncat,"1.png\ndog,2.png"\n', "1 of 2 rows .*'file_name', such as row 1: '1.png"),
        ("label,file_name\nlarge, cat,1.png\nsmall, dog,2.png\n", "have 3 fields, but its head has only 2: label"),
        ("file_name,label\n1.png,cat,x\n2.png,dog,y\n", "have 3 fields, but its head has only 2"),
        ("file_name,label,text\n1.png,a, b, cat,x\n2.png,a, b, dog,y\n", "have 5 fields, but its head has only 3"),
    ],
)
@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv", "labels.tsv"])
def test_quotes_and_separators_that_move_fields_are_an_error(photos, name, content, message):
    (photos / name).write_text(content.replace(",", "\t") if name.endswith("tsv") else content)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(
            **({"dataset_name": str(photos)} if name == "metadata.csv" else {"files": {"train": photos / name}})
        )


def test_a_named_column_with_line_breaks_is_an_error_and_another_is_told(photos, caplog):
    (photos / "labels.csv").write_text('file_name,label,kind\n1.png,cat,"a\nb"\n2.png,dog,c\n')
    files = {"train": photos / "labels.csv"}
    assert classes(load_image_dataset(files=files)["train"]) == ["cat", "dog"]
    assert "1 of 2 rows of" in caplog.text and "column 'kind', such as row 0" in caplog.text
    with pytest.raises(ValueError, match="line break in the column 'kind'"):
        load_image_dataset(files=files, label_column="kind")
