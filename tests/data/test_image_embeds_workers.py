"""Image embeddings whose images are decoded by other processes: the same values, the same errors."""

import multiprocessing

import datasets
import pytest
import torch
from conftest import EMOJI
from datasets import IterableDataset
from PIL import Image

from clip_prompt_peft.data import UnreadableImageError, cache_image_embeds, load_image_dataset


FILES = {"train": str(EMOJI / "noto-train.parquet")}


@pytest.fixture
def tower_runs(classifier, monkeypatch):
    """The number of images in each forward pass of the image tower."""
    runs, features_of = [], classifier.get_image_features

    def get_image_features(**inputs):  # not a hook, with which nothing would be read from the cache
        runs.append(len(inputs["pixel_values"]))
        return features_of(**inputs)

    monkeypatch.setattr(classifier, "get_image_features", get_image_features)
    return runs


@pytest.fixture
def computed_anew():
    datasets.disable_caching()
    yield
    datasets.enable_caching()


def of_a_table():
    return load_image_dataset(files=FILES)["train"].select(range(3, 14))


def in_another_order():
    return load_image_dataset(files=FILES)["train"].shuffle(seed=1).select(range(11))


def of_a_stream():
    return load_image_dataset(files=FILES, streaming=True)["train"].take(11)


def of_a_generator():
    """Images of many sizes in a stream without types."""

    def examples():
        for index in range(11):
            yield {"image": Image.new("RGB", (8 + index, 40), (index, 0, 0)), "label": index % 3}

    return IterableDataset.from_generator(examples)


@pytest.mark.usefixtures("computed_anew")
@pytest.mark.parametrize("num_views", [None, 2])
@pytest.mark.parametrize("images", [of_a_table, in_another_order, of_a_stream, of_a_generator])
def test_order_and_values_do_not_depend_on_workers(classifier, image_processor, tower_runs, images, num_views):
    def embed(num_workers):
        return cache_image_embeds(
            images(), classifier, image_processor, batch_size=4, num_views=num_views, num_workers=num_workers
        ).with_format("torch")

    alone, with_workers = embed(0), embed(2)
    assert sum(tower_runs) == 2 * 11 * (num_views or 1)
    assert with_workers[:]["labels"].tolist() == alone[:]["labels"].tolist()
    assert torch.equal(with_workers[:]["image_embeds"], alone[:]["image_embeds"])
    assert len({tuple(embeds.flatten().tolist()) for embeds in alone[:]["image_embeds"]}) == 11


@pytest.mark.slow
@pytest.mark.usefixtures("computed_anew")
@pytest.mark.parametrize("images", [of_a_table, of_a_generator])
def test_workers_that_are_not_forked_give_the_same(classifier, image_processor, images):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = cache_image_embeds(images(), classifier, image_processor, num_workers=1, num_views=2)
    finally:
        multiprocessing.set_start_method(method, force=True)
    alone = cache_image_embeds(images(), classifier, image_processor, num_views=2)
    for embeds in (spawned, alone):
        embeds.set_format("torch")
    assert torch.equal(spawned[:]["image_embeds"], alone[:]["image_embeds"])


@pytest.mark.usefixtures("own_datasets_cache")
def test_the_cache_serves_any_number_of_workers(classifier, image_processor, tower_runs):
    for num_workers in (1, 0):
        cache_image_embeds(of_a_table(), classifier, image_processor, num_workers=num_workers)
    assert sum(tower_runs) == 11


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_error_about_a_damaged_file_names_it(classifier, image_processor, tmp_path, streaming, num_workers):
    for index in range(6):
        folder = tmp_path / ("cat" if index % 2 else "dog")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    (tmp_path / "dog" / "4.png").write_bytes(b"no image")
    images = load_image_dataset(folders={"train": str(tmp_path)})["train"]
    if streaming:
        images = images.to_iterable_dataset()
    with pytest.raises(UnreadableImageError, match=r"^Cannot read '.*4\.png': it is damaged[^\n]*$"):
        cache_image_embeds(images, classifier, image_processor, batch_size=2, num_workers=num_workers)


@pytest.mark.usefixtures("own_datasets_cache")
def test_the_precision_of_the_tower_is_a_choice_and_belongs_to_the_result(classifier, image_processor, tower_runs):
    images = of_a_table()
    full = cache_image_embeds(images, classifier, image_processor)[:]["image_embeds"]
    half = cache_image_embeds(images, classifier, image_processor, compute_dtype="bfloat16")[:]["image_embeds"]
    assert sum(tower_runs) == 22
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05 * full.abs().max().item())
    assert torch.equal(cache_image_embeds(images, classifier, image_processor)[:]["image_embeds"], full)
    assert sum(tower_runs) == 22


@pytest.mark.usefixtures("computed_anew")
def test_autocast_of_the_caller_does_not_change_what_is_stored(classifier, image_processor):
    full = cache_image_embeds(of_a_table(), classifier, image_processor)[:]["image_embeds"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = cache_image_embeds(of_a_table(), classifier, image_processor)[:]["image_embeds"]
    assert torch.equal(inside, full)


@pytest.mark.usefixtures("computed_anew")
def test_the_global_random_state_is_not_changed_by_workers(classifier, image_processor):
    cache_image_embeds(of_a_table(), classifier, image_processor, num_workers=1, num_views=2)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("settings", [{"num_workers": -1}, {"num_workers": "all"}, {"compute_dtype": "int8"}])
def test_invalid_settings_are_refused(classifier, image_processor, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        cache_image_embeds(of_a_table(), classifier, image_processor, **settings)
