"""Names and labels of classes as tables have them: empty, alike, one only, unlabeled, numbers."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from clip_prompt_peft.data import class_names_of, hold_out, load_image_dataset, sample_few_shot


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def write(file, labels, names=None, kind="string"):
    feature = Value(kind) if names is None else ClassLabel(names=names)
    columns = {"image": [PILImage.new("RGB", (4, 4))] * len(labels), "label": labels}
    Dataset.from_dict(columns, features=Features({"image": Image(), "label": feature})).to_parquet(file)
    return file


@pytest.fixture
def load(tmp_path):
    def load(labels, names=None, test=None, kind="string", **settings):
        files = {"train": write(tmp_path / "train.parquet", labels, names, kind)}
        if test is not None:
            files["test"] = write(tmp_path / "test.parquet", test, names)
        return load_image_dataset(files=files, **settings)

    return load


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "", "dog"], "1 of the 3 rows of the split 'train' have an empty class name, '', such as row 1"),
        (["cat", "dog", " \t", "_"], r"2 of the 4 rows .* empty class name, ' \\t', such as row 2"),
        (["cat", "dog", " cat"], "twice, as ' cat' and 'cat'"),
        (["red_car", "red  car"], "twice, as 'red  car' and 'red_car'"),
        (["caf\u00e9", "cafe\u0301"], r"twice, as 'cafe\\u0301' and 'caf\\xe9'.*NFC and NFD"),
    ],
)
@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_names_in_a_column_of_text_that_are_none_or_the_same(load, labels, message, kind):
    with pytest.raises(ValueError, match=message):
        load(labels, kind=kind)


@pytest.mark.parametrize(
    ("names", "message"), [(["cat", ""], r"class_names\[1\] is empty"), (["cat", "cat "], "'cat' and 'cat '")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_of_a_class_label_when_its_names_are_used(load, names, message, streaming):
    train = load([0, 1], names, streaming=streaming)["train"]
    with pytest.raises(ValueError, match=message):
        class_names_of(train)


def test_a_test_set_that_stores_accents_otherwise_gets_a_hint(load):
    with pytest.raises(ValueError, match="no class of 'train', such as 'cafe\u0301' in row 1. It has 'caf\u00e9'"):
        load(["caf\u00e9", "bar"], test=["bar", "cafe\u0301"])


@pytest.mark.parametrize(("labels", "names"), [(["cat", "cat"], None), ([0, 0], ["cat"]), ([0, 0], ["cat", "dog"])])
def test_images_of_one_class_only_are_told(load, caplog, labels, names):
    load(labels, names)
    assert "All images of 'train' are of one class, 'cat'" in caplog.text


def test_a_stream_of_one_class_is_told(load, caplog):
    load([0, 0], ["cat"], streaming=True)
    assert "The stream has one class only, 'cat'" in caplog.text


@pytest.mark.parametrize("shots", [0, 1])
def test_the_command_refuses_one_class(tmp_path, run_here, shots):
    file = write(tmp_path / "train.parquet", ["cat"] * 6)
    with pytest.raises(SystemExit, match="The training images are of one class only, 'cat'"):
        run_here("train", "--train_file", file, "--shots", shots, "--output_dir", "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_minus_one_for_no_label_is_told_with_its_rows(load, split):
    labels = {"labels": [0, 1, 0], "test": [0, 1]}
    labels["labels" if split == "train" else "test"] = [0, -1, 1, -1]
    message = f"2 of the 4 rows of the split '{split}' have no label .they are marked by -1., such as row 1, 3; leave"
    with pytest.raises(ValueError, match=message):
        load(**labels, names=["cat", "dog"])


@pytest.mark.parametrize("streaming", [False, True])
def test_images_without_a_label_are_not_drawn_as_a_class(tmp_path, streaming):
    file = write(tmp_path / "train.parquet", [0, 1, -1], ["cat", "dog"])
    dataset = Dataset.from_parquet(str(file))
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(ValueError, match="Row 2 has no label, but -1 in the column 'label'.*filter"):
        sample_few_shot(dataset, 1)
    if not streaming:
        with pytest.raises(ValueError, match="Row 2 has no label"):
            hold_out(dataset, 0.5)


def test_numbers_as_names_are_told(load, caplog):
    with pytest.warns(UserWarning, match="look like numbers, ids or placeholders: '0', '10', '2'. CLIP reads"):
        load(["0", "2", "10"])
    load(["cat", "-1"])
    assert "'-1' is taken for the name of a class" in caplog.text


def test_integers_with_gaps_need_names(load):
    with pytest.raises(ValueError, match=r"numbers alone do not say .* cast the column to ClassLabel.*label \(int64"):
        load([0, 2, 5], kind="int64")


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("columns", [{"label_column": "image"}, {"image_column": "image", "label_column": "image"}])
def test_one_column_is_not_for_both(load, names, streaming, columns):
    with pytest.raises(ValueError, match="'image' cannot be the image column and the label column"):
        load([0, 1] if names else ["cat", "dog"], names, streaming=streaming, **columns)


def test_labels_are_no_images(load):
    with pytest.raises(ValueError, match="'label' cannot be the image column and the label column"):
        load(["cat", "dog"], image_column="label")
    with pytest.raises(ValueError, match="The image column 'label' holds ClassLabel of 2"):
        load([0, 1], ["cat", "dog"], image_column="label")


def test_text_labels_of_a_stream(load):
    with pytest.raises(ValueError, match="'label' of this stream holds string.*load it without streaming=True"):
        load(["cat", "dog"], streaming=True)
