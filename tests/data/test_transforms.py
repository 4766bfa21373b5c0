"""Transforms, formats and modes that the user of a dataset has set: what the model gets to see of them."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from PIL import ImageOps

from clip_prompt_peft.data import (
    UnreadableImageError,
    cache_image_embeds,
    content_hash,
    hold_out,
    keep_classes,
    load_image_dataset,
    sample_few_shot,
    standardize,
    with_pixel_values,
)
from clip_prompt_peft.image_files import process_images


pytestmark = pytest.mark.usefixtures("own_datasets_cache")
SIZE = 48


def pictures(num=4):
    values = np.random.default_rng(0).integers(0, 255, size=(num, SIZE, SIZE, 3), dtype=np.uint8)
    return [PILImage.fromarray(pixels) for pixels in values]


@pytest.fixture
def dataset(tmp_path):
    types = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "inverted": Value("bool")})
    columns = {"image": pictures(), "label": [0, 1, 0, 1], "inverted": [True, False, True, False]}
    Dataset.from_dict(columns, features=types).save_to_disk(tmp_path / "images")
    return load_from_disk(tmp_path / "images")


def inverted(batch):
    """Uses a column of its own, and returns images only."""
    return {"image": [ImageOps.invert(image) if do else image for image, do in zip(batch["image"], batch["inverted"])]}


def pixels_of(images, image_processor):
    return process_images(image_processor, images)["pixel_values"]


def pixels(dataset, image_processor):
    return torch.stack(with_pixel_values(dataset, image_processor)[:]["pixel_values"])


@pytest.fixture
def expected(image_processor):
    images = pictures()
    images[0], images[2] = ImageOps.invert(images[0]), ImageOps.invert(images[2])
    return pixels_of(images, image_processor)


def test_a_transform_comes_before_the_processor(dataset, image_processor, expected):
    examples = with_pixel_values(dataset.with_transform(inverted), image_processor)
    assert torch.equal(torch.stack(examples[:]["pixel_values"]), expected)
    assert examples[:]["labels"] == [0, 1, 0, 1] and examples.features["labels"].names == ["cat", "dog"]
    assert torch.equal(examples.select([2, 1])[0]["pixel_values"], expected[2])
    only_names = examples.select_columns("labels")
    assert len(only_names.filter(lambda label: label == 1, input_columns="labels")) == 2


def test_set_transform_and_a_transform_of_chosen_columns(dataset, image_processor, expected):
    dataset.set_transform(inverted, columns=["image", "inverted"], output_all_columns=True)
    assert torch.equal(pixels(dataset, image_processor), expected)
    assert torch.equal(pixels(dataset.with_format(None), image_processor), pixels_of(pictures(), image_processor))


@pytest.mark.parametrize(
    "subset",
    [
        lambda dataset: sample_few_shot(dataset, 2),
        lambda dataset: keep_classes(dataset, ["cat", "dog"]),
        lambda dataset: hold_out(dataset, 0.5)[0],
        lambda dataset: dataset.shuffle(seed=1),
    ],
)
def test_it_stays_with_what_is_drawn(dataset, image_processor, expected, subset):
    numbered = dataset.add_column("number", range(4))
    numbers = subset(numbered)["number"][:]
    drawn = subset(numbered.with_transform(inverted))
    assert torch.equal(pixels(drawn, image_processor), expected[list(numbers)])


def gray_arrays(batch):
    return {"image": [np.asarray(image.convert("L")) for image in batch["image"]], "label": batch["label"]}


def tensors(batch):
    arrays = [np.moveaxis(np.asarray(image.convert("L").convert("RGB")), -1, 0) for image in batch["image"]]
    return {"image": [torch.tensor(array.copy()) for array in arrays], "label": torch.tensor(batch["label"])}


def unit_tensors(batch):
    return {**tensors(batch), "image": [tensor.float() / 255 for tensor in tensors(batch)["image"]]}


@pytest.mark.parametrize("transform", [gray_arrays, tensors, unit_tensors])
def test_arrays_and_tensors(dataset, image_processor, transform):
    gray = pixels_of([image.convert("L").convert("RGB") for image in pictures()], image_processor)
    assert torch.equal(pixels(dataset.with_transform(transform), image_processor), gray)


def test_labels_that_it_returns_are_taken(dataset, image_processor):
    dataset = dataset.with_transform(lambda batch: {**batch, "label": [1 - label for label in batch["label"]]})
    assert with_pixel_values(dataset, image_processor)[:]["labels"] == [1, 0, 1, 0]


def test_a_transform_that_opens_the_images_itself(tmp_path, image_processor, classifier):
    for number, image in enumerate(pictures(2)):
        image.save(tmp_path / f"{number}.png")
    dataset = Dataset.from_dict({"file": ["0", "1"], "label": [0, 1]}).with_transform(
        lambda batch: {"image": [PILImage.open(tmp_path / f"{name}.png") for name in batch["file"]]}
    )
    assert torch.equal(pixels(dataset, image_processor), pixels_of(pictures(2), image_processor))
    assert len(cache_image_embeds(dataset, classifier, image_processor)) == 2


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda batch: {"pixel_values": batch["image"]}, "returns pixel_values, but no 'image'"),
        (lambda batch: {"image": batch["image"][:1]}, "returns 1 images for 4 rows"),
        (lambda batch: {"image": batch["image"][0]}, "returns a PngImageFile for 4 rows"),
        (lambda batch: batch["image"], "returns a list, but no 'image'"),
        (lambda batch: {"image": [3] * len(batch["image"])}, "object of type int"),
        (lambda batch: {"image": [torch.randn(3, 8, 8) for _ in batch["image"]]}, "does not say which value is white"),
    ],
)
def test_what_cannot_be_an_image_is_told(dataset, image_processor, transform, message):
    with pytest.raises(ValueError, match=message):
        with_pixel_values(dataset.with_transform(transform), image_processor)[:]


def test_a_damaged_file_is_named(tmp_path, image_processor):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    dataset = Dataset.from_dict({"image": [str(tmp_path / "bad.jpg")], "label": [0]}).cast_column("image", Image())
    with pytest.raises(UnreadableImageError, match="bad.jpg"):
        with_pixel_values(dataset.with_transform(inverted), image_processor)[0]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_embeddings_are_of_the_transformed_images_and_this_is_told(
    dataset, classifier, image_processor, expected, caplog, num_workers
):
    settings = {"batch_size": 3, "num_workers": num_workers}
    plain = cache_image_embeds(dataset, classifier, image_processor, **settings)["image_embeds"][:]
    assert not caplog.records
    embeds = cache_image_embeds(dataset.with_transform(inverted), classifier, image_processor, **settings)
    assert "The transform inverted of the dataset is applied to each image once" in caplog.text
    assert "with_pixel_values" in caplog.text and "with_format(None)" in caplog.text
    with torch.no_grad():
        of_images = classifier.get_image_features(expected).pooler_output
    torch.testing.assert_close(embeds["image_embeds"][:], of_images, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain[0], of_images[0], atol=1e-3)
    other = cache_image_embeds(dataset.with_transform(lambda batch: batch), classifier, image_processor, **settings)
    torch.testing.assert_close(other["image_embeds"][:], plain)


@pytest.mark.parametrize(
    "formatted",
    [
        lambda dataset: dataset.with_format("torch"),
        lambda dataset: dataset.with_format("numpy"),
        lambda dataset: dataset.with_format("pandas"),
        lambda dataset: dataset.with_format("arrow"),
        lambda dataset: dataset.with_format("torch", columns=["label"]),
        lambda dataset: dataset.with_format(None, columns=["inverted"]),
        lambda dataset: dataset.cast_column("image", Image(decode=False)),
        lambda dataset: dataset.cast_column("image", Image(mode="RGB")),
    ],
)
def test_formats_do_not_matter(dataset, classifier, image_processor, formatted):
    plain, formatted = dataset, formatted(dataset)
    assert torch.equal(pixels(formatted, image_processor), pixels(plain, image_processor))
    assert content_hash(formatted) == content_hash(plain)
    expected = cache_image_embeds(plain, classifier, image_processor)
    embeds = cache_image_embeds(formatted, classifier, image_processor)
    torch.testing.assert_close(embeds["image_embeds"][:], expected["image_embeds"][:])


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_formats_of_a_stream_do_not_matter(dataset, image_processor, kind):
    stream = dataset.to_iterable_dataset().with_format(kind)
    first = next(iter(with_pixel_values(stream, image_processor)))["pixel_values"]
    assert torch.equal(first, pixels(dataset, image_processor)[0])


def test_rows_without_an_image_are_told_whatever_the_format(dataset, image_processor):
    empty = Dataset.from_dict(
        {"image": [None], "label": [0]},
        features=dataset.features.copy().__class__({"image": Image(), "label": dataset.features["label"]}),
    )
    for formatted in (empty.with_format("torch"), empty.with_format("numpy", columns=["label"])):
        with pytest.raises(UnreadableImageError, match="1 of 1 rows hold no image"):
            with_pixel_values(formatted, image_processor)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "F"])
def test_a_mode_of_the_column_is_respected(dataset, classifier, image_processor, mode):
    typed = dataset.cast_column("image", Image(mode=mode))
    expected = pixels_of([image.convert(mode).convert("RGB") for image in pictures()], image_processor)
    assert torch.equal(pixels(typed, image_processor), expected)
    assert torch.equal(pixels(standardize({"train": typed})["train"], image_processor), expected)
    stream = sample_few_shot(typed.to_iterable_dataset(), 4, when_fewer="all")
    assert stream.features["image"].mode == mode
    first = cache_image_embeds(typed, classifier, image_processor)["image_embeds"][0]
    with torch.no_grad():
        torch.testing.assert_close(first, classifier.get_image_features(expected[:1]).pooler_output[0])


def test_a_mode_in_a_file(dataset, image_processor, tmp_path):
    dataset.cast_column("image", Image(mode="L")).to_parquet(tmp_path / "gray.parquet")
    gray = pixels_of([image.convert("L").convert("RGB") for image in pictures()], image_processor)
    for streaming in (False, True):
        loaded = load_image_dataset(files={"train": tmp_path / "gray.parquet"}, streaming=streaming)["train"]
        first = next(iter(with_pixel_values(loaded, image_processor)))["pixel_values"]
        assert torch.equal(first, gray[0])


def test_an_unknown_mode_is_told(dataset, image_processor):
    with pytest.raises(ValueError, match=r"Image\(mode='gray'\).*cast_column"):
        with_pixel_values(dataset.cast_column("image", Image(mode="gray")), image_processor)


def test_a_transform_before_standardize_sees_the_new_names_as_with_rename_columns(dataset, image_processor, expected):
    records = [
        {"bytes": row["bytes"], "path": None} for row in dataset.cast_column("image", Image(decode=False))["image"]
    ]
    types = Features(
        {"picture": {"path": Value("string"), "bytes": Value("binary")}, "label": dataset.features["label"]}
    )
    raw = Dataset.from_dict({"picture": records, "label": [0, 1, 0, 1]}, features=types)
    invert = raw.with_transform(lambda batch: {"image": [ImageOps.invert(image) for image in batch["image"]]})
    loaded = standardize({"train": invert})["train"]
    assert torch.equal(pixels(loaded, image_processor)[0], expected[0])
