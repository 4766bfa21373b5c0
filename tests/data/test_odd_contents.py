"""Files and columns that hold something else than they should: each loads, or its error says what to do."""

import base64
import io
import pickle
import shutil
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_CLIP
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)
from clip_prompt_peft.data import (
    UnreadableImageError,
    class_names_of,
    content_hash,
    load_image_dataset,
    standardize,
    with_pixel_values,
)
from clip_prompt_peft.image_files import decode_image


pytestmark = pytest.mark.usefixtures("own_datasets_cache")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
TABLE = pd.DataFrame({"file_name": ["1.png", "sub/2.png"], "label": ["cat", "café"]})


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "1.png").write_bytes(png(10))
    (folder / "sub/2.png").write_bytes(png(200))
    return folder


def load(file, **settings):
    train = load_image_dataset(files={"train": file}, **settings)["train"]
    assert class_names_of(train) == ["café", "cat"]
    assert [image.getpixel((0, 0))[0] for image in train["image"]] == [10, 200]
    return train


def text_of(**settings):
    return TABLE.to_csv(index=False, **settings)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("1.csv", text_of(sep=";").encode(), "';'"),
        ("1.csv", text_of(sep="\t").encode(), "'\\t'"),
        ("1.csv", text_of(sep="|").encode(), "'|'"),
        ("1.tsv", text_of().encode(), "','"),
        ("1.csv", ("sep=;\r\n" + text_of(sep=";")).encode("utf-8-sig"), ""),
        ("1.csv", text_of().encode("utf-8-sig"), ""),
        ("1.csv", text_of().encode("utf-16"), ""),
        ("1.tsv", text_of(sep="\t").encode("utf-16"), ""),
        ("1.csv", b"\xfe\xff" + text_of(sep=";").encode("utf-16-be"), "';'"),
        ("1.csv", text_of().encode("utf-32"), ""),
        ("1.csv", text_of().replace("sub/2", "sub\\2").encode(), "'sub\\\\2.png' as 'sub/2.png'"),
        ("1.csv", text_of().replace("sub/2.png", "sub/2.png ").encode(), "'sub/2.png ' as 'sub/2.png'"),
        ("1.csv", ("\n" + text_of(sep=";").replace("label", " label ")).encode(), "';'"),
        ("1.csv", text_of().replace("label", "\u200blabel").encode(), ""),
    ],
)
def test_tables_of_other_programs_are_read(photos, caplog, name, content, told):
    (photos / name).write_bytes(content)
    load(photos / name)
    assert told in caplog.text and bool(told) == bool(caplog.records)


def test_metadata_of_other_programs_is_read(photos, caplog):
    (photos / "metadata.csv").write_bytes(text_of(sep=";").replace("/", "\\").encode("utf-16"))
    assert class_names_of(load_image_dataset(str(photos))["train"]) == ["café", "cat"]
    assert "';'" in caplog.text and "'sub/2.png'" in caplog.text


def test_accents_and_addresses_of_files(photos, caplog):
    (photos / "sub/2.png").rename(photos / "sub/caf\u00e9 2.png")
    for name in ("sub/cafe\u0301 2.png", f"file://{photos}/sub/caf%C3%A9%202.png"):
        TABLE.assign(file_name=["1.png", name]).to_csv(photos / "1.csv", index=False)
        caplog.clear()
        load(photos / "1.csv")
        assert "1 of the 2 paths" in caplog.text and "another spelling" in caplog.text


@pytest.mark.parametrize("name", ["1", "1.PNG", "D:\\photos\\1.png", "other/1.png"])
def test_a_file_that_may_be_meant_is_named(photos, name):
    TABLE.assign(file_name=[name, "sub/2.png"]).to_csv(photos / "1.csv", index=False)
    with pytest.raises(ValueError, match=f"1 of the 2 images .*do not exist.* There is '{photos}/1.png'"):
        load(photos / "1.csv")


JSONL = TABLE.to_json(orient="records", lines=True, force_ascii=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.csv", text_of().encode("latin-1"), r"line 3 is not in UTF-8.*0xe9.*café.*'latin-1' or 'cp1252'"),
        ("1.jsonl", JSONL.encode("latin-1"), "line 2 is not in UTF-8.*'latin-1'"),
        ("1.jsonl", JSONL.encode("utf-16"), "it is in utf-16.*'utf-16' as ENCODING"),
        ("1.csv", text_of().encode("utf-16-le"), "UTF-16 without a mark"),
        ("1.csv", POINTER, "pointer of Git LFS.*git lfs pull"),
        ("1.jsonl", POINTER, "pointer of Git LFS.*git lfs pull"),
        ("1.parquet", POINTER, "pointer of Git LFS.*git lfs pull"),
        ("1.arrow", POINTER, "pointer of Git LFS.*git lfs pull"),
        ("1.csv", b"PK\x03\x04" + bytes(200), "Excel file.*save a sheet as csv"),
        ("1.csv", b"<!DOCTYPE html><html>404</html>", "web page; download the file again"),
        ("1.parquet", text_of().encode(), "damaged, empty or of another format"),
        ("1.csv", b"PAR1" + bytes(100), "parquet file; give it the ending"),
        ("1.xlsx", b"PK\x03\x04", "Files must be of one format.*1.xlsx.*Save the sheet as csv"),
        ("1.json", b"[]", "Write one object a line"),
        ("1.txt", b"", "Write it as csv"),
        ("1.zip", b"PK\x03\x04", "Unpack it"),
        ("1.npz", b"PK\x03\x04", "Save its arrays as image files"),
    ],
)
def test_tables_that_cannot_be_read_say_what_to_do(photos, name, content, message):
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(photos / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "pointer of Git LFS.*git lfs pull"),
        (b"%PDF-1.7 ...", "PDF document; save its pages"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing; save it as an image"),
        (b"<?xml version='1.0'?><svg/>", "XML text, such as an SVG"),
        (b"\0\0\0\x18ftypmp42", "a video; save the frames"),
        (b"RIFF\0\0\0\0AVI LIST", "a video; save the frames"),
        (b"\0\0\0\x18ftypheic", "HEIC photo; save it as JPEG"),
        (pickle.dumps(np.zeros((4, 4))), "pickle of Python.*can run code"),
        (b"\x93NUMPY\x01\0", "array of NumPy; save it as an image"),
        (b"\x1f\x8b\x08", "compressed by gzip; unpack"),
        (bytes(257) + b"ustar", "tar archive; unpack"),
        (b"", "damaged, or no image"),
        (png()[:40], "damaged, or no image"),
    ],
)
def test_what_is_called_an_image(tmp_path, image_processor, content, message):
    (tmp_path / "1.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"1.png': it is .*{message}"):
        decode_image(tmp_path / "1.png")
    records = Dataset.from_dict({"image": [content or b"?"], "label": [0]}).cast_column("image", ImageFeature())
    with pytest.raises(UnreadableImageError, match=message):
        with_pixel_values(records, image_processor)[0]


ENCODERS = {
    "base64": lambda content: base64.b64encode(content).decode(),
    "data URI": lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
    "for addresses": lambda content: base64.urlsafe_b64encode(content).decode().rstrip("="),
    "in lines": lambda content: base64.encodebytes(content).decode(),
    "in percents": lambda content: "data:image/png," + quote_from_bytes(content),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_images_as_texts_in_a_table(photos, image_processor, encode, ending):
    texts = [encode(png(value)) for value in (10, 200)]
    table = TABLE.assign(file_name=texts).rename(columns={"file_name": "image"})
    file = photos / f"1.{ending}"
    lines = {"orient": "records", "lines": True}
    table.to_csv(file, index=False) if ending == "csv" else (
        table.to_json(file, **lines) if ending == "jsonl" else table.to_parquet(file)
    )
    train = load(file)
    assert with_pixel_values(train, image_processor)[1]["pixel_values"].shape[0] == 3
    raw = standardize({"train": Dataset.from_pandas(table)}, image_column="image")["train"]
    expected = with_pixel_values(train, image_processor)[1]["pixel_values"]
    assert (with_pixel_values(raw, image_processor)[1]["pixel_values"] == expected).all()
    assert content_hash(raw) == content_hash(train)


def test_texts_that_are_no_images_beside_others_and_long_paths(photos):
    TABLE.assign(file_name=[base64.b64encode(png()).decode(), "sub/2.png"]).to_csv(photos / "1.csv", index=False)
    with pytest.raises(ValueError, match="1 of 2 rows are no images, such as row 1: 'sub/2.png'"):
        load(photos / "1.csv")
    TABLE.assign(file_name=["x" * 5000, "sub/2.png"]).to_csv(photos / "1.csv", index=False)
    with pytest.raises(ValueError, match="1 of the 2 images .* do not exist, such as '.*xxx[.]{3}'") as error:
        load(photos / "1.csv")
    assert len(str(error.value)) < 800


def test_addresses_that_are_listed_twice_are_told_as_they_are(photos, caplog):
    TABLE.assign(file_name="https://localhost:9/1.png").to_csv(photos / "1.csv", index=False)
    train = load_image_dataset(files={"train": photos / "1.csv"})["train"]
    assert "such as 'https://localhost:9/1.png'" in caplog.text
    with pytest.raises(UnreadableImageError, match="Download it first"):
        with_pixel_values(train, None)[0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0], [0, 1]], "lists of 'label' hold several labels, or a number for each class"),
        ([["cat", "dog"], ["cat"]], "lists of 'label' hold several labels"),
        ([None, None], "null, no values"),
        ([True, False], "label .bool"),
        ([0.5, 1.5], "label .double|label .float64"),
        (pd.to_datetime(["2020-01-01", "2020-01-02"]), "label .timestamp"),
    ],
)
def test_labels_of_other_kinds(photos, labels, message):
    pd.DataFrame({"file_name": TABLE["file_name"], "label": labels}).to_parquet(photos / "1.parquet")
    with pytest.raises(ValueError, match=f"Expected a column of type ClassLabel or string.*{message}"):
        load(photos / "1.parquet")


def test_a_column_for_each_class(photos):
    TABLE[["file_name"]].assign(cat=[1, 0], dog=[0, 1]).to_csv(photos / "1.csv", index=False)
    with pytest.raises(ValueError, match="such as 'cat' and 'dog', make one column.*idxmax"):
        load(photos / "1.csv")
    TABLE.assign(label=["", ""]).to_csv(photos / "1.csv", index=False)
    with pytest.raises(ValueError, match="'label' holds null, no values"):
        load(photos / "1.csv", label_column="label")


@pytest.mark.parametrize("several", ["cat|dog", "cat;dog", "['cat', 'dog']"])
def test_several_labels_in_one_text_are_told(photos, caplog, several):
    TABLE.assign(label=["cat", several]).to_csv(photos / "1.csv", index=False)
    assert load_image_dataset(files={"train": photos / "1.csv"})["train"].features["label"].num_classes == 2
    assert "1 class names look like several labels, such as" in caplog.text


def test_archives_in_place_of_folders(photos, tmp_path):
    (tmp_path / "zip").mkdir()
    archive = tmp_path / "zip/photos.zip"
    archive.write_bytes(b"PK\x03\x04")
    for source in (
        {"folders": {"train": archive}},
        {"dataset_name": str(archive)},
        {"folders": {"train": archive.parent}},
    ):
        with pytest.raises(ValueError, match="photos.zip.*Unpack it, and name what it holds"):
            load_image_dataset(**source)
    with pytest.raises(ValueError, match="photos.zip.*unpack it"):
        load_image_dataset(str(archive.parent))


def test_the_command_says_so_too(tmp_path, run_here):
    (tmp_path / "photos.zip").write_bytes(b"PK\x03\x04")
    for flag, told in (
        ("dir", "--train_dir: .*is a file and not a folder of images. Unpack it"),
        ("file", "Unpack it"),
    ):
        with pytest.raises(SystemExit, match=told):
            run_here("train", f"--train_{flag}", "photos.zip")


def test_the_first_of_several_images_is_taken_and_told(tmp_path):
    for name in ("pages.tif", "moving.webp", "moving.gif"):
        pages = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (250, 0, 50)]
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], lossless=True)
        with pytest.warns(UserWarning, match="several images.*the first one is taken"):
            assert decode_image(tmp_path / name).getpixel((0, 0))[0] > 240


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_was_not_fetched(classifier, tmp_path, file):
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / file).write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{file} is .*pointer of Git LFS.*git lfs pull"):
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_folder_with_only_tables_is_read_as_it_is_written(tmp_path, caplog, ending):
    folder = tmp_path / "tables"
    folder.mkdir()
    (tmp_path / "1.png").write_bytes(png())
    names = ["7"] * (10_000 if ending == "csv" else 1) + ["007", "TRUE", "NA", "1.10"]
    table = pd.DataFrame({"image": [str(tmp_path / "1.png")] * len(names), "label": names})
    for split in ("train", "test"):
        write = table.to_csv if ending == "csv" else table.to_json
        write(
            folder / f"{split}.{ending}",
            **({"index": False} if ending == "csv" else {"orient": "records", "lines": True}),
        )
    splits = load_image_dataset(str(folder))
    assert splits["train"].features["label"].names == sorted(set(names)) and len(splits["test"]) == len(names)
    by_builder = load_image_dataset(
        "json" if ending == "jsonl" else ending, data_files={"train": str(folder / f"test.{ending}")}
    )
    assert by_builder["train"].features["label"].names == sorted(set(names))


@pytest.mark.parametrize("name", ["007", "dog"])
def test_tables_with_settings_are_left_to_datasets_which_may_change_names(tmp_path, photos, caplog, name):
    labels = ["cat"] * 10_000 + [name]
    table = pd.DataFrame({"file_name": [str(photos / "1.png")] * len(labels), "label": labels})
    table.to_csv(tmp_path / "1.csv", index=False, quotechar="'")
    source = {"data_files": {"train": str(tmp_path / "1.csv")}, "quotechar": "'", "image_column": "file_name"}
    names = class_names_of(load_image_dataset("csv", **source)["train"])
    assert names == sorted(["cat", name.lstrip("0")])
    assert ("class names such as '7' may have lost zeros" in caplog.text) == (name == "007")


def test_files_of_published_splits_that_were_not_fetched(tmp_path):
    (tmp_path / "split.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match="split.json' is not a json file.*git lfs pull"):
        load_image_dataset(zhou_split=str(tmp_path / "split.json"), image_dir=str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(POINTER)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="0.tar' is no tar file: .*git lfs pull"):
        load_image_dataset(webdataset_dir=str(tmp_path))


def test_a_folder_of_files_that_were_not_fetched(tmp_path):
    (tmp_path / "tables").mkdir()
    for name in ("train.parquet", "train.csv"):
        (tmp_path / "tables" / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{name}.*git lfs pull"):
            load_image_dataset(str(tmp_path / "tables"))
        (tmp_path / "tables" / name).unlink()


def test_a_base_model_that_was_not_fetched(tmp_path):
    for file in Path(TINY_CLIP).iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="model.safetensors' is no file of safetensors: .*git lfs pull"):
        CLIPForPromptClassification.from_pretrained(tmp_path, class_names=["cat", "dog"])
