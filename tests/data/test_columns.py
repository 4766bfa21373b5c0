import pytest
from datasets import ClassLabel, Dataset, Features

from clip_prompt_peft.data import class_names_of, clean_class_name


def dataset(names):
    return Dataset.from_dict({"label": [0]}, features=Features({"label": ClassLabel(names=names)}))


@pytest.mark.parametrize(
    ("spelled", "clean"),
    [("golden_retriever", "golden retriever"), ("  the__cat ", "the cat"), ("BMW X5", "BMW X5")],
)
def test_underscores_become_spaces_and_case_is_kept(spelled, clean):
    assert clean_class_name(spelled) == clean


def test_class_names_are_in_the_order_of_the_labels():
    assert class_names_of(dataset(["zebra", "polar_bear"])) == ["zebra", "polar bear"]


def test_names_that_become_equal_are_an_error():
    with pytest.raises(ValueError, match="twice.*polar bear"):
        class_names_of(dataset(["polar_bear", "polar bear"]))


def test_a_column_without_names_is_an_error_that_lists_the_columns():
    numbers = Dataset.from_dict({"label": [0, 1], "file": ["a", "b"]})
    with pytest.raises(ValueError, match="'label' is a Value.*columns: label, file"):
        class_names_of(numbers)
    with pytest.raises(ValueError, match="'breed' is missing"):
        class_names_of(numbers, "breed")


def test_camel_case_is_split_on_request():
    assert clean_class_name("ApplyEyeMakeup", split_camel_case=True) == "Apply Eye Makeup"
    assert clean_class_name("TV_DVDs", split_camel_case=True) == "TV DVDs"
    assert clean_class_name("ApplyEyeMakeup") == "ApplyEyeMakeup"
