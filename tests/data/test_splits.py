from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from clip_prompt_peft.data import base_new_names, hold_out, keep_classes, split_base_new


@pytest.fixture
def dataset():
    features = Features({"row": Value("int64"), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({"row": range(30), "label": [0] * 20 + [1] * 10}, features=features)


def test_the_fraction_of_each_class_is_held_out_without_overlap(dataset):
    kept, held_out = hold_out(dataset, 0.2)
    assert Counter(held_out["label"]) == {0: 4, 1: 2}
    assert sorted([*kept["row"], *held_out["row"]]) == list(range(30))


def test_the_same_seed_holds_out_the_same_examples(dataset):
    first, again, other = (list(hold_out(dataset, 0.2, seed=seed)[1]["row"]) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_an_invalid_fraction_is_an_error(dataset, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(dataset, fraction)


def test_classes_too_small_to_be_split_are_an_error(dataset):
    with pytest.raises(ValueError, match="cannot be held out of every class.*Give images to evaluate on"):
        hold_out(dataset.select([0, 25, 26]), 0.2)


def test_the_first_half_of_the_classes_is_base_and_labels_start_at_0():
    names = ["e", "d", "c", "b", "a"]
    labels = [4, 0, 3, 1, 2, 4, 0]
    dataset = Dataset.from_dict({"item": list(range(7)), "kind": labels, "last": list("abcdefg")})
    dataset = dataset.cast_column("kind", ClassLabel(names=names))
    base, new = split_base_new(dataset, label_column="kind")
    assert base.features["kind"].names == ["e", "d", "c"] and new.features["kind"].names == ["b", "a"]
    assert (base["item"][:], base["kind"][:]) == ([1, 3, 4, 6], [0, 1, 2, 0])
    assert (new["item"][:], new["kind"][:]) == ([0, 2, 5], [1, 0, 1])
    assert base.column_names == dataset.column_names


def test_classes_are_kept_in_the_given_order():
    dataset = Dataset.from_dict({"label": [0, 1, 2, 0]}).cast_column("label", ClassLabel(names=["x", "y", "z"]))
    kept = keep_classes(dataset, ["z", "x"])
    assert kept["label"][:] == [1, 0, 1]
    assert kept.features["label"].names == ["z", "x"]


def test_an_odd_number_of_classes_is_split_as_in_the_literature():
    assert [len(half) for half in base_new_names([str(i) for i in range(37)])] == [19, 18]  # Oxford Pets
    assert base_new_names(["a", "b"]) == (["a"], ["b"])


def test_missing_columns_and_classes_are_errors():
    dataset = Dataset.from_dict({"label": [0, 1]})
    with pytest.raises(ValueError, match="ClassLabel column"):
        split_base_new(dataset)
    with pytest.raises(ValueError, match="'kind' is missing"):
        keep_classes(dataset, ["a"], label_column="kind")
    named = dataset.cast_column("label", ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match=r"no class 'c' \(1 of 2 are missing\).*a, b"):
        keep_classes(named, ["a", "c"])
    with pytest.raises(ValueError, match="at least two"):
        base_new_names(["a"])
