"""Columns of the Arrow types that other programs write."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image
from PIL import Image as Pil

from clip_prompt_peft.data import load_image_dataset


NAMES = ["cat", "dog", "cat", "dog"]
RECORD = [("bytes", pa.binary()), ("path", pa.string())]


def png(shade):
    file = io.BytesIO()
    Pil.new("RGB", (8, 8), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


PNGS = [png(shade) for shade in (10, 20, 30, 40)]


def load(tmp_path, images=None, labels=None, **settings):
    records = pa.array([{"bytes": image, "path": None} for image in PNGS], pa.struct(RECORD))
    table = pa.table(
        {"image": records if images is None else images, "breed": pa.array(NAMES) if labels is None else labels}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    settings = {"label_column": "breed", "cache_dir": str(tmp_path), **settings}
    return load_image_dataset(files={"train": str(tmp_path / "train.parquet")}, **settings)["train"]


TEXT_TYPES = {
    "large_string": pa.array(NAMES, pa.large_string()),
    "string_view": pa.array(NAMES, pa.string_view()),
    "categorical": pa.array(NAMES).dictionary_encode(),
    "categorical_large": pa.array(NAMES, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_labels_of_every_type_of_text(kind, tmp_path):
    dataset = load(tmp_path, labels=TEXT_TYPES[kind])
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [0, 1, 0, 1]


IMAGE_TYPES = {
    "large_binary": pa.array(PNGS, pa.large_binary()),
    "binary_view": pa.array(PNGS, pa.binary_view()),
    "binary": pa.array(PNGS, pa.binary()),
    "large_fields": pa.array(
        [{"bytes": image, "path": None} for image in PNGS],
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    ),
    "path_first": pa.array([{"bytes": image, "path": None} for image in PNGS], pa.struct(RECORD[::-1])),
    "views": pa.array(
        [{"bytes": image, "path": None} for image in PNGS],
        pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())]),
    ),
    "further_fields": pa.array(
        [{"bytes": image, "path": None, "width": 8} for image in PNGS], pa.struct([*RECORD, ("width", pa.int32())])
    ),
    "without_path": pa.array([{"bytes": image} for image in PNGS], pa.struct(RECORD[:1])),
}


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_images_of_every_type(kind, tmp_path):
    dataset = load(tmp_path, images=IMAGE_TYPES[kind], image_column="image")
    assert dataset.features["image"] == Image()
    assert [image.getpixel((0, 0))[0] for image in dataset["image"]] == [10, 20, 30, 40]
    assert dataset["label"][:] == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_paths_of_every_type(kind, tmp_path):
    for index, image in enumerate(PNGS):
        (tmp_path / f"{index}.png").write_bytes(image)
    paths = pa.array([str(tmp_path / f"{index}.png") for index in range(4)], kind)
    dataset = load(tmp_path, images=paths, image_column="image")
    assert [image.getpixel((0, 0))[0] for image in dataset["image"]] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([None] * 4, pa.null()), r"'breed' holds null"),
        (pa.array([0, 1, 0, 1], pa.int8()), r"'breed' holds int8.*numbers alone"),
        (pa.array([0.0, None, 0.0, 1.0]), r"'breed' holds float64"),
        (pa.array([True, False, True, False]), r"'breed' holds bool"),
        (pa.array([["cat"]] * 4, pa.large_list(pa.string())), r"'breed' holds LargeList"),
        (pa.array(["cat", None, "dog", None]), r"2 of the 4 rows of the split 'train' have no label, such as row 1"),
    ],
)
def test_other_labels_are_refused_with_column_and_type(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, labels=labels)
