"""Parquet and arrow files that are loaded together: a label means the same class in all of them, or it is an error."""

import glob
import io
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from clip_prompt_peft.data import load_image_dataset


pytestmark = pytest.mark.usefixtures("own_datasets_cache")

ORDERS = {"ab": ["cat", "dog"], "ba": ["dog", "cat"], "abc": ["cat", "dog", "owl"]}


def pictures():
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(file, "PNG")
    return [{"bytes": file.getvalue(), "path": None}] * 2


def rows(names):
    return Dataset.from_dict(
        {"image": pictures(), "label": [0, 1]},
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )


def write(file, labels):
    """Writes two rows: a list of class names, or the key of an order, as a `ClassLabel`; numbers and text as such."""
    if isinstance(labels, str):
        rows(ORDERS[labels]).to_parquet(file)
    else:
        pd.DataFrame({"image": pictures(), "label": labels}).to_parquet(file)
    return str(file)


def names_of(dataset):
    return [dataset.features["label"].names[label] for label in dataset["label"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["ba", "abc"])
@pytest.mark.parametrize("names", [("train.parquet", "test.parquet"), ("train-0.parquet", "train-1.parquet")])
def test_files_of_a_folder_with_other_classes_are_an_error(tmp_path, names, other, streaming):
    for name, order in zip(names, ("ab", other)):
        write(tmp_path / name, order)
    with pytest.raises(ValueError, match="classes of the column 'label' differ") as error:
        load_image_dataset(str(tmp_path), streaming=streaming)
    assert all(text in str(error.value) for text in (*names, "'cat', 'dog'"))
    files = {"train": [str(tmp_path / name) for name in names]}
    for source in ({"files": files}, {"dataset_name": "parquet", "data_files": files}):
        with pytest.raises(ValueError, match="classes of the column 'label' differ"):
            load_image_dataset(**source, streaming=streaming)


def test_arrow_files_with_other_classes_are_an_error(tmp_path):
    for name in ("ab", "ba"):
        rows(ORDERS[name]).save_to_disk(tmp_path / name)
    files = glob.glob(str(tmp_path / "*/*.arrow"))
    assert len(files) == 2
    with pytest.raises(ValueError, match=r"differ from label 0 on: .*data-00000.*data-00000"):
        load_image_dataset(files={"train": files})
    assert names_of(load_image_dataset(files={"train": files[:1] * 2})["train"])


@pytest.mark.parametrize("first", ["ab", ["cat", "dog"]])
def test_names_in_one_file_and_numbers_in_another_are_an_error(tmp_path, first):
    folder = tmp_path / "photos"
    folder.mkdir()
    files = [write(folder / "train-0.parquet", first), write(folder / "train-1.parquet", [0, 1])]
    for some in (files, files[::-1]):
        with pytest.raises(ValueError, match=r"holds .* in .*train-\d.parquet', but .*train-\d.parquet'"):
            load_image_dataset(files={"train": some})
    with pytest.raises(ValueError, match="values without names in .*train-1.parquet'"):
        load_image_dataset(str(folder))


def test_text_is_put_in_its_place_by_name_or_refused(tmp_path):
    files = [write(tmp_path / "0.parquet", "ba"), write(tmp_path / "1.parquet", ["cat", "dog"])]
    assert names_of(load_image_dataset(files={"train": files})["train"]) == ["dog", "cat", "cat", "dog"]
    with pytest.raises(ValueError, match="holds text in .*1.parquet', but class names in .*0.parquet'"):
        load_image_dataset(files={"train": files[::-1]})


def test_a_card_with_another_order_than_the_file_is_an_error(tmp_path):
    write(tmp_path / "train.parquet", "ab")
    names = "".join(f"          '{label}': {name}\n" for label, name in enumerate(ORDERS["ba"]))
    card = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
    (tmp_path / "README.md").write_text(f"{card}      class_label:\n        names:\n{names}---\n")
    with pytest.raises(ValueError, match="'its dataset card or `features`' has 2, 'dog', 'cat'"):
        load_image_dataset(str(tmp_path))


@pytest.mark.parametrize("other", ["ba", "abc", [0, 1]])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_are_not_on_this_machine_are_compared_before_they_are_loaded(tmp_path, other, streaming):
    elsewhere = fsspec.filesystem("memory")
    for name, labels in (("train", "ab"), ("test", other)):
        elsewhere.pipe(f"/pets/{name}.parquet", Path(write(tmp_path / "x.parquet", labels)).read_bytes())
    files = {name: [f"memory://pets/{name}.parquet"] for name in ("train", "test")}
    with pytest.raises(ValueError, match=r"memory:///pets/train.parquet.*memory:///pets/test.parquet"):
        load_image_dataset("parquet", data_files=files, streaming=streaming)


def test_equal_classes_are_loaded(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "test.parquet"):
        write(tmp_path / name, "ab")
    splits = load_image_dataset(str(tmp_path))
    assert names_of(splits["train"]) == ["cat", "dog"] * 2 and names_of(splits["test"]) == ["cat", "dog"]
