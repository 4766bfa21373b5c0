"""A folder of classes with a list of the images for the test."""

import logging

import pytest
from PIL import Image

from clip_prompt_peft.data import load_image_dataset, split_by_list


PATHS = ["cat/1.png", "cat/2.png", "cat/3.jpg", "a dog/1.png", "a dog/café.png", "a dog/3.png"]


@pytest.fixture
def photos(tmp_path, own_datasets_cache):
    """The folder of six photos, and what it is read as."""
    for number, path in enumerate(PATHS):
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "photos" / path)
    return tmp_path / "photos", load_image_dataset(folders={"train": tmp_path / "photos"})["train"]


def split(photos, content, encoding="utf-8"):
    """Returns the values of red, which number the photos, for training and test."""
    folder, images = photos
    (folder.parent / "test.txt").write_bytes(content.encode(encoding))
    parts = split_by_list(images, folder, folder.parent / "test.txt")
    names = [part.features["label"].names for part in parts]
    assert names == [["a dog", "cat"]] * 2
    return [sorted(image.getpixel((0, 0))[0] // 40 for image in part["image"]) for part in parts]


@pytest.mark.parametrize(
    "content",
    [
        "cat/2.png\na dog/café.png\n",
        "a dog/café.png\r\n\r\n./cat/2.png",
        "\ufeffcat\\2.png\na dog\\cafe\u0301.png",
        "cat/2\na dog/café",
        "FOLDER/cat/2.png\nFOLDER/a dog/café.png",
    ],
    ids=["plain", "of Windows", "other separators and accents", "without endings", "absolute"],
)
def test_what_is_listed_is_for_the_test(photos, content):
    assert split(photos, content.replace("FOLDER", str(photos[0]))) == [[0, 2, 3, 5], [1, 4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "cat/9.png\ncat/1.png",
            "1 of 2 lines of '.*test.txt' are no images in '.*photos': 'cat/9.png'. Expected",
        ),
        ("photos/cat/1.png", "Write 'cat/1.png': paths are relative to"),
        ("cat/1.png 0", "'cat/1.png 0'. Expected one path per line, relative to the folder, such as cat/1.jpg, and"),
        ("cat/1.png\ncat/2.png\n./cat/1.png", "more than once: 'cat/1.png', './cat/1.png'. Remove"),
        ("cat/1.png\ncat/1.png", "more than once: 'cat/1.png'. Remove"),
        ("cat/1.png\ncat/2.png\ncat/3.jpg", "leaves 1 of 2 classes without training images: 'cat'"),
        ("\n \n", "is empty. Expected one path per line"),
        ("cat", "'cat'. Expected one path"),
        ("../photos.png", "'../photos.png'. Expected one path"),
        ("notes.txt", "The file exists, but is not among the images"),
    ],
)
def test_a_list_that_cannot_be_followed_is_an_error(photos, content, message):
    (photos[0] / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=message):
        split(photos, content)


def test_names_without_endings_must_be_clear(photos, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/cat/2.jpg")
    again = photos[0], load_image_dataset(folders={"train": photos[0]})["train"]
    with pytest.raises(ValueError, match="'cat/2'. Several images have this name; add the ending"):
        split(again, "cat/2")
    assert split(again, "cat/2.png") == [[0, 0, 2, 3, 4, 5], [1]]


def test_the_encoding_of_a_list_is_told_by_its_mark_or_named_in_an_error(photos):
    utf_8 = split(photos, "cat/2.png")
    assert split(photos, "cat/2.png", encoding="utf-16") == utf_8
    with pytest.raises(ValueError, match="line 2 is not in UTF-8. It has the byte 0xe9, which in Latin-1 reads"):
        split(photos, "cat/2.png\ncat/\u00e9.png", encoding="latin-1")


def test_classes_without_test_images_are_told(photos, caplog):
    with caplog.at_level(logging.WARNING):
        split(photos, "cat/2.png")
    assert "lists no test images of 1 of 2 classes: 'a dog'" in caplog.text


def test_images_without_files_cannot_be_listed(photos, tmp_path):
    images = photos[1].map(lambda row: {"image": row["image"].copy()})
    with pytest.raises(ValueError, match="not read from files of their own"):
        split((photos[0], images), "cat/2.png")
