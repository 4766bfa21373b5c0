from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from clip_prompt_peft.data import hold_out


@pytest.fixture
def dataset():
    features = Features({"row": Value("int64"), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({"row": range(30), "label": [0] * 20 + [1] * 10}, features=features)


def test_every_class_gives_its_share_and_no_example_is_in_both_parts(dataset):
    kept, held_out = hold_out(dataset, 0.2)
    assert Counter(held_out["label"]) == {0: 4, 1: 2}
    assert sorted([*kept["row"], *held_out["row"]]) == list(range(30))


def test_the_same_seed_holds_out_the_same_examples(dataset):
    first, again, other = (list(hold_out(dataset, 0.2, seed=seed)[1]["row"]) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_share_that_is_none_is_an_error(dataset, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(dataset, fraction)


def test_classes_too_small_to_be_split_are_an_error_that_says_what_to_do(dataset):
    with pytest.raises(ValueError, match="cannot be held out of every class.*Give images to evaluate on"):
        hold_out(dataset.select([0, 25, 26]), 0.2)
