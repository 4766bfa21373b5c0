"""Folders of images as people have them: links, stray and unreadable files, odd names, different depths."""

import os
import socket
import unicodedata
from pathlib import Path

import pytest
from PIL import Image as PILImage

from clip_prompt_peft.data import load_image_dataset


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def write(root, *paths):
    """Writes images, or empty files if the ending is not of an image that Pillow writes."""
    for path in paths:
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".png", ".jpg", ".jfif"):
            PILImage.new("RGB", (4, 4)).save(file, format="PNG")
        else:
            file.write_bytes(b"")
    return root


def load(**folders):
    return load_image_dataset(folders=folders)


def classes(dataset):
    """The number of images of each class."""
    names = dataset.features["label"].names
    labels = [names[label] for label in dataset["label"]]
    return {name: labels.count(name) for name in names}


def test_linked_class_folders_and_images_are_read_and_loops_end(tmp_path):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    write(tmp_path / "elsewhere", "1.png", "2.png")
    (train / "bird").symlink_to(tmp_path / "elsewhere")
    (train / "cat" / "2.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (train / "dog" / "all").symlink_to(train)
    assert classes(load(train=train)["train"]) == {"bird": 2, "cat": 2, "dog": 1}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "class folders of .*: bird. They are empty"),
        ("1.heic", r"bird. They hold 1 .heic files \(such as .*1.heic"),
        ("1", "1 files without an ending"),
        (".hidden.png", "1 hidden images"),
    ],
)
def test_a_class_folder_without_images_is_an_error_that_names_it(tmp_path, file, message):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    (train / "bird").mkdir()
    if file:
        write(train / "bird", file)
    with pytest.raises(ValueError, match=message):
        load(train=train)


def test_skipped_files_are_told_and_those_of_the_system_are_not(tmp_path, caplog):
    train = write(tmp_path / "train", "cat/1.PNG", "cat/2.jfif", "cat/3.heic", "dog/1.png", "dog/notes.txt")
    write(train, "cat/.DS_Store", "Thumbs.db", "__MACOSX/cat/1.png", ".ipynb_checkpoints/1.png")
    (train / "dog" / "2.png").symlink_to(tmp_path / "gone.png")
    assert classes(load(train=train)["train"]) == {"cat": 2, "dog": 1}
    for told in ("1 .heic files", "1 .txt files", "2 hidden images", "1 broken links"):
        assert told in caplog.text
    assert "DS_Store" not in caplog.text and "Thumbs" not in caplog.text


@pytest.mark.parametrize("name", ["a [b] c", "what?*", "ünï code", "plain/", "train [1]/*"])
def test_folders_of_any_name_and_depth_are_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, "cat/1.png", "dog [1]/1.png")
    write(tmp_path / "far/away/test", "cat/1.png", "dog [1]/*.png")
    splits = load(train=name, test=tmp_path / "far/away/test")
    assert classes(splits["train"]) == classes(splits["test"]) == {"cat": 1, "dog [1]": 1}
    assert splits["train"][0]["image"].size == (4, 4)


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pets", "cat/1.png", "dog/1.png")
    assert classes(load(train="~/pets")["train"]) == {"cat": 1, "dog": 1}


@pytest.mark.parametrize("stray", ["cover.png", "cat/young/1.png"])
def test_an_image_in_the_way_is_named(tmp_path, stray):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png", stray)
    with pytest.raises(ValueError, match=f"different depths, such as .*{stray}"):
        load(train=train)


def test_splits_inside_of_a_folder_are_not_mixed(tmp_path):
    write(tmp_path, "photos/train/cat/1.png", "photos/train/dog/1.png", "photos/test/cat/1.png")
    with pytest.raises(ValueError, match="folders of splits, test, train"):
        load(train=tmp_path / "photos")


def test_classes_two_folders_deep_are_told(tmp_path, caplog):
    train = write(tmp_path / "train", "pets/cat/1.png", "pets/dog/1.png")
    assert classes(load(train=train)["train"]) == {"cat": 1, "dog": 1}
    assert "Their class is the folder that holds them" in caplog.text


def test_accents_are_the_same_however_they_are_stored(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    train = write(tmp_path / "train", f"{composed}/1.png", "bar/1.png")
    test = write(tmp_path / "test", f"{decomposed}/1.png", "bar/1.png")
    assert classes(load(train=train, test=test)["test"]) == {"bar": 1, composed: 1}
    write(train, f"{decomposed}/1.png")
    with pytest.raises(ValueError, match="NFC and NFD"):
        load(train=train)


@pytest.mark.parametrize("name", ["Dog", "dog "])
def test_a_class_that_differs_in_case_or_spaces_is_hinted_at(tmp_path, name):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    test = write(tmp_path / "test", "cat/1.png", f"{name}/1.png")
    hint = "as 'dog' and 'dog ', which differ in spaces" if " " in name else "It has 'dog', which differ in case"
    with pytest.raises(ValueError, match=hint):
        load(train=train, test=test)


def test_missing_test_classes_and_numbers_as_names_are_told(tmp_path, caplog):
    train = write(tmp_path / "train", "0/1.png", "1/1.png")
    test = write(tmp_path / "test", "1/1.png")
    with pytest.warns(UserWarning, match="look like numbers, ids or placeholders: '0', '1'. CLIP reads"):
        assert list(load(train=train, test=test)["test"]["label"]) == [1]
    assert "'test' has no images of 1 classes: ['0']" in caplog.text


def test_a_changed_image_changes_the_fingerprint(tmp_path):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    before, again = (load(train=train)["train"]._fingerprint for _ in range(2))
    os.utime(train / "cat/1.png", (1, 1))
    assert before == again != load(train=train)["train"]._fingerprint


def test_pipes_sockets_and_links_to_themselves_are_told_and_not_waited_for(tmp_path, monkeypatch, caplog):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    monkeypatch.chdir(train)
    os.mkfifo("cat/2.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("dog/2.png")
    (train / "cat/3.png").symlink_to("4.png")
    (train / "cat/4.png").symlink_to("3.png")
    assert classes(load(train=train)["train"]) == {"cat": 1, "dog": 1}
    assert "2 broken links (such as" in caplog.text and "2 pipes, sockets or devices (such as" in caplog.text


NAMES = (
    "a\nb",
    "\U0001f63a",
    " lead ",
    "x" * 240,
    "100%",
    "a#b?c",
    "a:b",
    "a&b=c",
    "'q\"",
    "a::b",
    "zip:x",
    "~",
    "{x}",
)


def test_images_of_any_name_are_read(tmp_path):
    train = write(tmp_path / "train", *(f"{name}/{name}.png" for name in NAMES))
    (dataset,) = load(train=train).values()
    assert classes(dataset) == dict.fromkeys(NAMES, 1) and {image.size for image in dataset["image"]} == {(4, 4)}


def test_names_that_differ_in_case_are_two_classes(tmp_path):
    """Of which the classifier says that their tokens are equal."""
    train = write(tmp_path / "train", "Cat/1.png", "cat/1.PNG")
    assert classes(load(train=train)["train"]) == {"Cat": 1, "cat": 1}


@pytest.mark.parametrize(
    "ending", ["parquet", "arrow", "tar", "zip", "csv", "tsv", "json", "jsonl", "txt", "md", "gz"]
)
@pytest.mark.parametrize("place", ["", "cat"])
def test_a_stray_file_does_not_take_the_place_of_the_folders(tmp_path, caplog, ending, place):
    train = write(tmp_path / "train", "cat/1.png", "dog/1.png")
    stray = train / place / f"train.{ending}"
    stray.write_bytes(b"of something else")
    for source in ({"folders": {"train": train}}, {"dataset_name": str(train)}):
        caplog.clear()
        assert classes(load_image_dataset(**source)["train"]) == {"cat": 1, "dog": 1}
        assert f"Skipped in {str(train)!r}: 1 .{ending} files (such as {str(stray)!r})" in caplog.text


def test_labels_in_a_metadata_file_are_read(tmp_path):
    train = write(tmp_path / "train [1]", "1.png", "2.png")
    rows = ('{"file_name": "1.png", "label": "cat"}', '{"file_name": "2.png", "label": "dog"}')
    (train / "metadata.jsonl").write_text("\n".join(rows))
    assert classes(load(train=train)["train"]) == {"cat": 1, "dog": 1}


def test_shards_and_paths_of_files_are_read(tmp_path):
    splits = load(train=write(tmp_path / "train", "cat/1.png", "dog/1.png"))
    shards = [tmp_path / f"part [{index}].parquet" for index in range(2)]
    for shard in shards:
        splits["train"].to_parquet(shard)
    assert classes(load_image_dataset(files={"train": shards})["train"]) == {"cat": 2, "dog": 2}
    assert classes(load_image_dataset(files={"train": shards[0]})["train"]) == {"cat": 1, "dog": 1}
