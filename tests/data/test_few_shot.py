import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from clip_prompt_peft.data import sample_few_shot, sample_few_shot_splits


RECORDED = json.loads((Path(__file__).parent / "recorded_draws.json").read_text())
FEATURES = Features({"file": Value("string"), "label": ClassLabel(names=["beagle", "sphynx", "pug", "bengal"])})


def dataset(rows):
    return Dataset.from_dict({"file": [row[0] for row in rows], "label": [row[1] for row in rows]}, features=FEATURES)


@pytest.fixture(scope="module")
def train():
    return dataset(RECORDED["train"])


@pytest.fixture(scope="module")
def validation():
    return dataset(RECORDED["validation"])


@pytest.mark.parametrize("draw", RECORDED["draws"], ids=lambda d: "{seed}-{num_shots}-{when_fewer}".format(**d))
def test_the_sample_is_the_one_of_coop(draw, train, validation):
    settings = {key: draw[key] for key in ("num_shots", "seed", "when_fewer")}
    few_train, few_validation = sample_few_shot_splits(train, validation, **settings)
    assert list(few_train["file"]) == draw["train"]
    assert list(few_validation["file"]) == draw["validation"]
    assert list(sample_few_shot(train, **settings)["file"]) == draw["train"]


def test_every_class_has_num_shots_distinct_examples(train):
    few = sample_few_shot(train, num_shots=3, seed=5)
    assert Counter(few["label"]) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(set(few["file"])) == 12


def test_another_seed_draws_other_examples(train):
    assert list(sample_few_shot(train, 2, seed=1)["file"]) != list(sample_few_shot(train, 2, seed=2)["file"])


def test_the_draw_does_not_depend_on_the_global_random_state(train):
    import random

    random.seed(7)
    first = sample_few_shot(train, 2)["file"]
    assert random.random() == random.Random(7).random()
    assert list(first) == list(sample_few_shot(train, 2)["file"])


def test_too_few_examples_are_an_error_that_names_the_class_and_its_size(train):
    with pytest.raises(ValueError, match=r"2 of 4 classes have fewer \(.*sphynx 3.*\).*at most 3"):
        sample_few_shot(train, num_shots=8)


def test_any_column_can_hold_the_class():
    names = Dataset.from_dict({"breed": ["pug", "pug", "beagle"]})
    assert Counter(sample_few_shot(names, 1, label_column="breed")["breed"]) == {"pug": 1, "beagle": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shots": 0}, "positive integer, got 0"),
        ({"num_shots": 1, "label_column": "breed"}, "no column 'breed'; the columns are file, label"),
        ({"num_shots": 1, "when_fewer": "some"}, "'error', 'all', 'repeat'.*'some'"),
    ],
)
def test_invalid_arguments_are_errors(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_few_shot(train, **arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_nan_are_no_classes(streaming):
    dataset = Dataset.from_dict({"label": [0.0, float("nan"), 1.0, float("nan")]})
    with pytest.raises(ValueError, match="Row 1 has no label, but nan in the column 'label'"):
        sample_few_shot(dataset.to_iterable_dataset() if streaming else dataset, num_shots=1)
