"""The rows that a `DataLoader` gets of image embeddings are those of `datasets.Dataset`, read from memory."""

import copy
import pickle

import datasets
import pytest
import torch
from conftest import EMOJI
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader

from clip_prompt_peft.data import cache_image_embeds, load_image_dataset


KEYS = [3, 0, 4, 3]


@pytest.fixture(scope="module")
def images():
    return load_image_dataset(files={"train": str(EMOJI / "noto-train.parquet")})["train"].select(range(6))


@pytest.fixture
def embeds(images, classifier, image_processor):
    return cache_image_embeds(images, classifier, image_processor)


@pytest.fixture
def num_reads(monkeypatch):
    """How many batches were read from Arrow."""
    reads, read = [], Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: reads.append(key) or read(self, key))
    return reads


def plain(embeds):
    """The same as a `Dataset` and nothing more."""
    rows = Dataset.from_dict(embeds.with_format(None)[:], features=embeds.features)
    form = embeds.format
    return rows.with_format(form["type"], columns=form["columns"], **form["format_kwargs"])


def assert_same_rows(embeds, keys=KEYS):
    torch.manual_seed(0)
    found = embeds.__getitems__(keys)
    torch.manual_seed(0)
    expected = plain(embeds).__getitems__(keys)
    assert len(found) == len(expected) == len(keys)
    for row, wanted in zip(found, expected):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.as_tensor(row[name]).dtype == torch.as_tensor(value).dtype
            assert torch.equal(torch.as_tensor(row[name]), torch.as_tensor(value))


def test_rows_are_the_same_and_read_once(embeds, num_reads):
    assert_same_rows(embeds)
    first = len(num_reads)
    embeds.__getitems__(KEYS)
    assert len(num_reads) == first


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"num_views": 3}, {"num_views": 3, "dtype": "float16"}])
def test_so_they_are_in_half_precision_and_of_views(images, classifier, image_processor, settings, num_reads):
    embeds = cache_image_embeds(images, classifier, image_processor, **settings)
    assert_same_rows(embeds)
    first = len(num_reads)
    embeds.__getitems__(KEYS)
    assert len(num_reads) == first


CHANGES = {
    "select": lambda embeds: embeds.select([5, 1, 2, 0, 3]),
    "the first": lambda embeds: embeds.select(range(5)),
    "filter": lambda embeds: embeds.filter(lambda row: bool(row["image_embeds"][0] < 10)),
    "shuffle": lambda embeds: embeds.shuffle(seed=1),
    "map": lambda embeds: embeds.map(lambda row: {"image_embeds": row["image_embeds"] + 1}),
    "another column": lambda embeds: embeds.add_column("weight", list(range(6))),
    "renamed": lambda embeds: embeds.rename_column("labels", "label"),
    "removed": lambda embeds: embeds.remove_columns("labels"),
    "one column": lambda embeds: embeds.with_format("torch", columns=["labels"]),
    "another type": lambda embeds: embeds.with_format("torch", dtype=torch.float64),
    "numpy": lambda embeds: embeds.with_format("numpy", columns=["labels"]),
    "halves": lambda embeds: datasets.concatenate_datasets([embeds.select(range(3)), embeds.select(range(3, 6))]),
    "twice": lambda embeds: datasets.concatenate_datasets([embeds, embeds]),
    "copy": copy.deepcopy,
    "pickle": lambda embeds: pickle.loads(pickle.dumps(embeds)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rows_follow_every_change(embeds, change):
    embeds.__getitems__([0])
    assert_same_rows(change(embeds))
    assert_same_rows(embeds)


def test_rows_follow_a_format_that_is_set_in_place(embeds):
    embeds.__getitems__([0])
    embeds.set_format("torch", columns=["image_embeds"])
    assert embeds.__getitems__([0])[0].keys() == {"image_embeds"}
    embeds.reset_format()
    assert isinstance(embeds.__getitems__([0])[0]["image_embeds"], list)


def test_many_embeddings_stay_where_they_are(embeds, monkeypatch, num_reads):
    monkeypatch.setattr("clip_prompt_peft.data.image_embeds.MAX_IN_MEMORY", 10)
    assert_same_rows(embeds)
    first = len(num_reads)
    embeds.__getitems__(KEYS)
    assert len(num_reads) == first + 1


def test_they_are_saved_and_loaded_as_any_dataset(embeds, tmp_path):
    embeds.__getitems__([0])
    embeds.save_to_disk(tmp_path / "embeds")
    assert torch.equal(load_from_disk(tmp_path / "embeds")[:]["image_embeds"], embeds[:]["image_embeds"])


def test_workers_of_a_data_loader_read_the_same(embeds):
    alone, with_workers = (list(DataLoader(embeds, batch_size=4, num_workers=number)) for number in (0, 2))
    assert [len(batch["labels"]) for batch in alone] == [4, 2]
    for batch, other in zip(alone, with_workers):
        assert torch.equal(batch["image_embeds"], other["image_embeds"])
        assert torch.equal(batch["labels"], other["labels"])


def test_a_row_that_does_not_exist_is_an_error(embeds):
    with pytest.raises(IndexError):
        embeds.__getitems__([0, 6])
