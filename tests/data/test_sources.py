import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from clip_prompt_peft.data import load_image_dataset


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def picture(value=0):
    return PILImage.fromarray(np.full((8, 8, 3), value, dtype=np.uint8))


def write_folder(root, images_per_class):
    for name, count in images_per_class.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(index).save(root / name / f"{index}.png")
    return str(root)


def write_parquet(path, columns, features=None):
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def test_folders_become_splits_with_the_folder_names_as_classes(tmp_path):
    splits = load_image_dataset(
        folders={
            "train": write_folder(tmp_path / "train", {"polar_bear": 2, "Zebra": 1}),
            "validation": write_folder(tmp_path / "[held] out", {"Zebra": 1}),
        }
    )
    assert splits["train"].features == {"image": Image(), "label": ClassLabel(names=["Zebra", "polar_bear"])}
    assert list(splits["train"]["label"]).count(1) == 2
    assert list(splits["validation"]["label"]) == [0]


def test_columns_of_any_name_are_found(tmp_path):
    file = write_parquet(
        tmp_path / "pets.parquet",
        {"photo": [picture()], "breed": [1], "note": ["x"]},
        Features({"photo": Image(), "breed": ClassLabel(names=["pug", "beagle"]), "note": Value("string")}),
    )
    train = load_image_dataset(files={"train": file})["train"]
    assert train.column_names == ["image", "label"]
    assert train.features["label"].names == ["pug", "beagle"]
    assert train[0]["image"].size == (8, 8)


def test_strings_become_labels_in_alphabetical_order_in_all_splits(tmp_path):
    def file(split, labels):
        features = Features({"image": Image(), "class": Value("string")})
        columns = {"image": [picture()] * len(labels), "class": labels}
        return write_parquet(tmp_path / f"{split}.parquet", columns, features)

    splits = load_image_dataset(
        files={"train": file("train", ["pug", "beagle", "pug"]), "test": file("test", ["pug"])}
    )
    assert splits["train"].features["label"].names == ["beagle", "pug"]
    assert list(splits["test"]["label"]) == [1]


def test_records_of_bytes_are_read_as_images(tmp_path):
    picture(200).save(tmp_path / "a.png")
    record = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    file = write_parquet(tmp_path / "plain.parquet", {"img": [record], "label": ["pug"]})
    assert load_image_dataset(files={"train": file})["train"][0]["image"].getpixel((0, 0)) == (200, 200, 200)


def test_a_named_column_may_hold_paths(tmp_path):
    picture(9).save(tmp_path / "a.png")
    file = write_parquet(tmp_path / "paths.parquet", {"where": [str(tmp_path / "a.png")], "label": ["pug"]})
    train = load_image_dataset(files={"train": file}, image_column="where")["train"]
    assert train[0]["image"].getpixel((0, 0)) == (9, 9, 9)


def test_a_split_without_labels_is_left_out(tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["pug", "beagle"])})
    files = {
        "train": write_parquet(tmp_path / "a.parquet", {"image": [picture()] * 2, "label": [0, 1]}, features),
        "test": write_parquet(tmp_path / "b.parquet", {"image": [picture()] * 2, "label": [-1, -1]}, features),
    }
    assert list(load_image_dataset(files=files)) == ["train"]
    assert "'test' has no labels" in caplog.text


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"image": [0], "number": [1]}, {}, r"No label column; name it with label_column.*number \(int64\)"),
        ({"image": [0], "a": [0], "b": [0]}, {}, r"More than one column could hold the labels \(a, b\)"),
        (
            {"image": [0], "label": [0]},
            {"label_column": "breed"},
            r"'breed' does not exist.*label \(ClassLabel of 1\)",
        ),
        ({"image": [0], "number": [1]}, {"label_column": "number"}, "'number' holds int64.*ClassLabel"),
        ({"number": [1], "label": [0]}, {}, r"No image column.*number \(int64\), label"),
        ({"image": [0], "label": [0]}, {"image_column": "label"}, "image column 'label' holds ClassLabel"),
    ],
)
def test_missing_columns_are_an_error_that_lists_the_columns(tmp_path, columns, arguments, message):
    kinds = {"image": Image(), "number": Value("int64")}
    features = Features({name: kinds.get(name, ClassLabel(names=["pug"])) for name in columns})
    columns = {name: [picture()] if name == "image" else values for name, values in columns.items()}
    file = write_parquet(tmp_path / "data.parquet", columns, features)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(files={"train": file}, **arguments)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'.*nowhere' does not exist"):
        load_image_dataset(folders={"train": str(tmp_path / "nowhere")})


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        load_image_dataset(folders={"train": str(tmp_path)})


@pytest.mark.parametrize("classes", [{"": 2}, {"only": 2}, {"pug/young": 1, "beagle": 1}])
def test_a_folder_of_another_layout_is_an_error_that_shows_the_layout(tmp_path, classes):
    with pytest.raises(ValueError, match="FOLDER/cat/1.jpg"):
        load_image_dataset(folders={"train": write_folder(tmp_path / "train", classes)})


def test_a_class_without_training_images_is_an_error(tmp_path):
    folders = {
        "train": write_folder(tmp_path / "train", {"cat": 1, "dog": 1}),
        "validation": write_folder(tmp_path / "val", {"cat": 1, "Dog": 1}),
    }
    with pytest.raises(ValueError, match="'validation' has images of classes that have none in 'train' .1.: Dog"):
        load_image_dataset(folders=folders)


def test_splits_with_other_classes_are_an_error(tmp_path):
    def file(name, names):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        return write_parquet(tmp_path / f"{name}.parquet", {"image": [picture()] * 2, "label": [0, 1]}, features)

    train, test = file("train", ["cat", "dog"]), file("test", ["dog", "cat"])
    with pytest.raises(ValueError, match="'test' has the classes .*in the same order"):
        load_image_dataset(files={"train": train, "test": test})


def test_a_string_label_that_train_does_not_have_is_an_error(tmp_path):
    def file(name, labels):
        features = Features({"image": Image(), "label": Value("string")})
        return write_parquet(tmp_path / f"{name}.parquet", {"image": [picture()], "label": labels}, features)

    with pytest.raises(ValueError, match="no class of 'train', such as 'wolf'"):
        load_image_dataset(files={"train": file("train", ["dog"]), "test": file("test", ["wolf"])})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "exactly one"),
        ({"dataset_name": "pets", "files": {"train": "a.parquet"}}, "exactly one"),
        ({"files": {"train": "missing.parquet"}}, "'missing.parquet' does not exist"),
    ],
)
def test_no_source_two_sources_and_a_missing_file_are_errors(source, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(**source)


def test_a_file_of_another_format_is_an_error(tmp_path):
    (tmp_path / "data.txt").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"\.parquet, \.arrow, \.csv.*data\.txt"):
        load_image_dataset(files={"train": str(tmp_path / "data.txt")})


def test_a_dataset_without_training_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no split 'train'; its splits are test"):
        load_image_dataset(folders={"test": write_folder(tmp_path / "test", {"cat": 1, "dog": 1})})


def test_classes_without_training_images_are_told(tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["pug", "beagle", "wolf"])})
    file = write_parquet(tmp_path / "a.parquet", {"image": [picture()] * 2, "label": [0, 1]}, features)
    load_image_dataset(files={"train": file})
    assert "Classes without images in 'train' (1 of 3): ['wolf']" in caplog.text


def test_names_of_a_test_set_are_those_of_the_training_classes(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["pug", "beagle"])})
    train = write_parquet(tmp_path / "a.parquet", {"image": [picture()] * 2, "label": [0, 1]}, features)
    texts = Features({"image": Image(), "label": Value("string")})
    test = write_parquet(tmp_path / "b.parquet", {"image": [picture()], "label": ["beagle"]}, texts)
    assert list(load_image_dataset(files={"train": train, "test": test})["test"]["label"]) == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": "a.parquet"}, r"files names what each split is read from, such as \{'train': 'a.parquet'\}"),
        ({"folders": "pets"}, "folders names what each split"),
        ({"dataset_name": "pets", "split": "train"}, "split='train' would load one split without the others"),
    ],
)
def test_a_source_without_splits_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(**arguments)


def test_one_column_for_images_and_labels_is_an_error(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"label": ["x.png", "y.png"]})
    with pytest.raises(ValueError, match="'label' cannot be the image column and the label column"):
        load_image_dataset(files={"train": file}, image_column="label")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"Cannot read .*a\.parquet' as parquet"):
        load_image_dataset(files={"train": tmp_path / "a.parquet"})


@pytest.fixture
def saved(tmp_path):
    """A folder that `DatasetDict.save_to_disk` wrote, with columns of names of its own."""
    folder = write_folder(tmp_path / "drawn", {"cat": 2, "dog": 3})
    split = load_image_dataset(folders={"train": folder})["train"].rename_column("label", "breed")
    DatasetDict(train=split, test=split.select([0, 4])).save_to_disk(tmp_path / "my pets")
    return tmp_path / "my pets"


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_loaded(saved, streaming):
    splits = load_image_dataset(saved, streaming=streaming)
    assert [example["label"] for example in splits["test"]] == [0, 1]
    assert splits["train"].features == {"image": Image(), "label": ClassLabel(names=["cat", "dog"])}
    alone = load_image_dataset(saved / "train", label_column="breed")
    assert list(alone) == ["train"] and alone["train"]["label"][:] == [0, 0, 1, 1, 1]
    apart = load_image_dataset(folders={"train": saved / "train", "test": saved / "test"})
    assert apart["test"]["label"][:] == [0, 1]


def test_folders_of_save_to_disk_that_are_no_splits_are_told(saved, tmp_path):
    with pytest.raises(ValueError, match=r"holds the splits train, test.*such as '.*my pets/train', or"):
        load_image_dataset(folders={"train": saved})
    with pytest.raises(ValueError, match="drawn' was not written by save_to_disk, but another"):
        load_image_dataset(folders={"train": saved / "train", "test": tmp_path / "drawn"})
