"""Streams: what works in one pass, and what says that it cannot."""

from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import EMOJI
from datasets import IterableDataset
from peft import get_peft_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.data import (
    cache_image_embeds,
    class_names_of,
    hold_out,
    keep_classes,
    load_image_dataset,
    sample_few_shot,
    split_base_new,
    with_pixel_values,
)


FILES = {split: str(EMOJI / f"noto-{split}.parquet") for split in ("train", "test")}


@pytest.fixture
def stream():
    return load_image_dataset(files=FILES, streaming=True)["train"]


@pytest.fixture(scope="module")
def dataset():
    return load_image_dataset(files=FILES)["train"]


def untyped(num=12):
    """A stream whose columns have no types, as of a generator; image i is of one shade, and of class i % 3."""
    passes = []

    def examples():
        passes.append(1)
        for index in range(num):
            yield {"image": Image.new("RGB", (8, 8), (index, 0, 0)), "label": index % 3}

    return IterableDataset.from_generator(examples), passes


def test_a_stream_has_columns_and_classes_of_the_dataset(stream, dataset):
    assert stream.features == dataset.features
    assert [example["label"] for example in stream.take(30)] == dataset["label"][:30]


def test_a_few_images_of_each_class_are_drawn(stream, dataset):
    few = sample_few_shot(stream, 2)
    assert set(Counter(few["label"]).values()) == {2} and len(few) == 24
    assert few.features == dataset.features
    known = {image.tobytes(): label for image, label in zip(dataset["image"], dataset["label"])}
    drawn = [(image.tobytes(), label) for image, label in zip(few["image"], few["label"])]
    assert len(set(drawn)) == 24 and all(known[image] == label for image, label in drawn)


def test_every_example_is_drawn_as_often_and_the_seed_decides():
    def draw(seed):
        few = sample_few_shot(untyped()[0], 2, seed=seed)
        return tuple(image.getpixel((0, 0))[0] for image in few["image"])

    counts = Counter(shade for seed in range(100) for shade in draw(seed))
    assert all(30 <= counts[shade] <= 70 for shade in range(12))  # 50 each on average, with a deviation of 5
    assert draw(7) == draw(7)


def test_classes_with_fewer_examples():
    with pytest.raises(ValueError, match="num_shots=5, but 3 of 3 classes have fewer .0 4, 1 4, 2 4."):
        sample_few_shot(untyped()[0], 5)
    assert len(sample_few_shot(untyped()[0], 5, when_fewer="all")) == 12
    assert len(sample_few_shot(untyped()[0], 5, when_fewer="repeat")) == 15


def test_embeddings_are_those_of_the_dataset(stream, dataset, classifier, image_processor):
    classifier.set_class_names(class_names_of(stream))
    found = cache_image_embeds(stream.take(7), classifier, image_processor, batch_size=3)
    expected = cache_image_embeds(dataset.select(range(7)), classifier, image_processor)
    torch.testing.assert_close(found[:]["image_embeds"], expected[:]["image_embeds"])
    assert found[:]["labels"].tolist() == dataset["label"][:7]


def test_columns_without_types(classifier, image_processor):
    stream, _ = untyped()
    embeds = cache_image_embeds(stream, classifier, image_processor)
    assert len(embeds) == 12 and embeds[:]["labels"].tolist() == [0, 1, 2] * 4
    pixels = [example["pixel_values"] for example in with_pixel_values(stream, image_processor)]
    torch.testing.assert_close(
        classifier.get_image_features(torch.stack(pixels)).pooler_output.detach(),
        embeds[:]["image_embeds"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_trainer_reads_pixel_values_of_a_stream(stream, classifier, image_processor, tmp_path):
    classifier.set_class_names(class_names_of(stream))
    args = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[])
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    trainer = Trainer(model, args, train_dataset=with_pixel_values(stream, image_processor))
    assert trainer.train().global_step == 2


@pytest.mark.parametrize(
    "use", [lambda data: keep_classes(data, ["animal"]), split_base_new, lambda data: hold_out(data, 0.1)]
)
def test_what_needs_all_labels_says_so(use, stream):
    with pytest.raises(TypeError, match="all labels at once.*without streaming=True"):
        use(stream)


def test_nothing_in_it(classifier, image_processor):
    with pytest.raises(ValueError, match="no examples"):
        cache_image_embeds(untyped(0)[0], classifier, image_processor)


def read_once(num=12):
    """A stream of something that cannot be read twice, such as a download."""
    examples = iter([{"image": Image.new("RGB", (8, 8), (index, 0, 0)), "label": index % 3} for index in range(num)])
    return IterableDataset.from_generator(lambda: examples)


def test_no_example_is_lost_of_a_stream_that_cannot_be_read_twice(classifier, image_processor):
    few = sample_few_shot(read_once(), 4)
    assert sorted(image.getpixel((0, 0))[0] for image in few["image"]) == list(range(12))
    assert cache_image_embeds(read_once(), classifier, image_processor)[:]["labels"].tolist() == [0, 1, 2] * 4


def test_drawing_and_embedding_take_one_pass(classifier, image_processor):
    stream, passes = untyped()
    sample_few_shot(stream, 1)
    assert len(passes) == 1
    cache_image_embeds(stream, classifier, image_processor)
    assert len(passes) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda stream: stream.filter(lambda example: example["label"] < 2),
        lambda stream: stream.map(lambda example: example),
        lambda stream: stream.shuffle(seed=0, buffer_size=20),
        lambda stream: stream.skip(3).take(20),
    ],
)
def test_streams_that_were_changed(change, stream, classifier, image_processor):
    """Some of these open the images, or forget the types of the columns."""
    classifier.set_class_names(class_names_of(stream))
    changed = change(stream.take(30))
    labels = [example["label"] for example in changed]
    embeds = cache_image_embeds(changed, classifier, image_processor)[:]
    assert embeds["labels"].tolist() == labels
    pixels = torch.stack([example["pixel_values"] for example in with_pixel_values(changed, image_processor)])
    found = classifier.get_image_features(pixels).pooler_output.detach()
    torch.testing.assert_close(found, embeds["image_embeds"], rtol=1e-4, atol=1e-4)
    assert set(sample_few_shot(changed, 1)["label"]) == set(labels)


def test_names_in_the_place_of_labels(image_processor, classifier):
    stream = IterableDataset.from_generator(
        lambda: ({"image": Image.new("RGB", (8, 8)), "label": name} for name in ("cat", "dog") * 2)
    )
    few = sample_few_shot(stream, 1).class_encode_column("label")
    assert list(few["label"]) == [0, 1]
    for use in (with_pixel_values, lambda data, processor: cache_image_embeds(data, classifier, processor)):
        with pytest.raises(ValueError, match="'label' holds string"):
            use(stream, image_processor)


@pytest.mark.usefixtures("own_datasets_cache")
class TestStreamsOfLocalFiles:
    """Of which only the paths are read, so that their class names are known."""

    @pytest.fixture
    def photos(self, tmp_path):
        for name in (
            "train/cat/1.png",
            "train/dog/2.png",
            "far/away/held out/dog/3.png",
            "far/away/held out/cat/4.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        return tmp_path

    def check(self, splits, classifier, image_processor, num=2):
        assert all(isinstance(split, IterableDataset) for split in splits.values())
        assert class_names_of(splits["train"]) == ["cat", "dog"]
        assert sorted(sample_few_shot(splits["train"], 1)["label"]) == [0, 1]
        classifier.set_class_names(["cat", "dog"])
        assert len(cache_image_embeds(splits["train"], classifier, image_processor)) == num

    def test_folders_at_different_depths(self, photos, classifier, image_processor):
        folders = {"train": photos / "train", "test": photos / "far/away/held out"}
        splits = load_image_dataset(folders=folders, streaming=True)
        self.check(splits, classifier, image_processor)
        assert sorted(example["label"] for example in splits["test"]) == [0, 1]

    def test_metadata(self, photos, classifier, image_processor):
        (photos / "train/metadata.csv").write_text("file_name,label\ncat/1.png,cat\ndog/2.png,dog\n")
        for source in ({"folders": {"train": photos / "train"}}, {"dataset_name": photos / "train"}):
            self.check(load_image_dataset(**source, streaming=True), classifier, image_processor)

    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_shards_of_tables(self, photos, classifier, image_processor, ending):
        shards = [photos / f"train/{number}.{ending}" for number in range(2)]
        for shard, rows in zip(shards, ([("cat/1.png", "cat")], [("dog/2.png", "dog"), ("cat/1.png", "cat")])):
            table = pd.DataFrame(rows, columns=["file_name", "label"])
            table.to_csv(shard, index=False) if ending == "csv" else table.to_parquet(shard)
        splits = load_image_dataset(files={"train": shards}, streaming=True)
        self.check(splits, classifier, image_processor, num=3)
