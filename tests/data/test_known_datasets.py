"""Tests of the table of known datasets."""

from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub.utils import validate_repo_id
from PIL import Image as PILImage

from clip_prompt_peft.data import known_datasets, load_known_dataset
from clip_prompt_peft.templates import check_template


NAMES = list(known_datasets())


def test_the_table_has_eleven_datasets_and_four_variants_of_imagenet():
    variants = [name for name, entry in known_datasets().items() if entry.classes_of]
    assert len(NAMES) - len(variants) == 11
    assert len(variants) == 4 and {known_datasets()[name].classes_of for name in variants} == {"imagenet"}


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_well_formed(name):
    entry = known_datasets()[name]
    check_template(entry.template)
    validate_repo_id(entry.hub_id)
    if entry.clip_benchmark:
        validate_repo_id(entry.clip_benchmark)
    assert entry.num_classes >= 2
    assert (
        entry.zhou_split is None or entry.zhou_split.startswith("split_zhou_") and entry.zhou_split.endswith(".json")
    )
    assert all(key.strip() and value.strip() for key, value in entry.class_names.items())
    assert not set(entry.left_out) & set(entry.class_names)


def dataset(names):
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    columns = {"image": [PILImage.new("RGB", (4, 4))] * len(names), "label": list(range(len(names)))}
    return Dataset.from_dict(columns, features=features)


def test_class_names_become_those_of_the_literature():
    fixed = known_datasets()["caltech101"].fix_class_names(
        dataset(["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "ceiling_fan"])
    )
    assert fixed.features["label"].names == ["face", "leopard", "ceiling fan"]
    assert fixed["label"][:] == [0, 1, 2]
    fixed = known_datasets()["ucf101"].fix_class_names(dataset(["ApplyEyeMakeup", "YoYo"]))
    assert fixed.features["label"].names == ["Apply Eye Makeup", "Yo Yo"]


def test_a_dataset_is_loaded_with_its_columns_and_class_names(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return DatasetDict(train=dataset(["AnnualCrop", "SeaLake"]), test=dataset(["AnnualCrop", "SeaLake"]))

    no_files = SimpleNamespace(config=SimpleNamespace(data_files=None), info=SimpleNamespace(features=None))
    monkeypatch.setattr("clip_prompt_peft.data.sources.find_builder", lambda *_: no_files)  # it asks the Hub
    monkeypatch.setattr("clip_prompt_peft.data.sources.load_dataset", load_dataset)
    splits = load_known_dataset("eurosat", revision="abc")
    assert asked == [((known_datasets()["eurosat"].hub_id, None), {"revision": "abc"})]
    assert splits["test"].features["label"].names == ["Annual Crop Land", "Sea or Lake"]


def test_unknown_names_and_copies_without_class_names_are_errors():
    with pytest.raises(ValueError, match="no dataset 'pets' in the table; there are imagenet, caltech101"):
        load_known_dataset("pets")
    with pytest.raises(ValueError, match="load_clip_benchmark"):
        load_known_dataset("imagenet_a")
