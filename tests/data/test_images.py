import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from clip_prompt_peft.data import RandomResizedCropFlip, cache_image_embeds, with_pixel_values


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 255, size=(40, 60, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


@pytest.fixture
def dataset(image):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({"image": [image, image.convert("L")], "label": [1, 0]}, features=features)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_evaluation_uses_the_processor_of_the_model(dataset, image, image_processor):
    examples = with_pixel_values(dataset, image_processor)[:]
    expected = image_processor([image, image.convert("L").convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(examples["pixel_values"]), expected)
    assert examples["labels"] == [1, 0]


def test_augmented_images_have_the_size_and_normalization_of_the_model(image_processor):
    white = PILImage.new("RGB", (90, 30), "white")
    features = Features({"image": Image(), "label": ClassLabel(names=["cat"])})
    dataset = Dataset.from_dict({"image": [white], "label": [0]}, features=features)
    plain = with_pixel_values(dataset, image_processor)[0]["pixel_values"]
    augmented = with_pixel_values(dataset, image_processor, augment=True)[0]["pixel_values"]
    torch.testing.assert_close(augmented, plain)  # any crop of a white image is white


def test_augmentation_is_random_and_reproducible(dataset, image_processor):
    augmented = with_pixel_values(dataset, image_processor, augment=True)
    torch.manual_seed(3)
    first, second = augmented[0]["pixel_values"], augmented[0]["pixel_values"]
    torch.manual_seed(3)
    again = augmented[0]["pixel_values"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_boxes_have_the_given_area_and_ratio():
    view = RandomResizedCropFlip((8, 8), scale=(0.2, 0.5), ratio=(0.5, 2.0), generator=generator())
    for _ in range(200):
        left, upper, right, lower = view.random_box(200, 100)
        assert 0 <= left < right <= 200
        assert 0 <= upper < lower <= 100
        width, height = right - left, lower - upper
        assert 0.19 < width * height / (200 * 100) < 0.51
        assert 0.48 < width / height < 2.1


def test_boxes_are_anywhere_in_the_image():
    view = RandomResizedCropFlip((8, 8), scale=(0.1, 0.1), ratio=(1, 1), generator=generator())
    boxes = [view.random_box(100, 100) for _ in range(2000)]
    assert min(box[0] for box in boxes) == 0
    assert max(box[2] for box in boxes) == 100
    assert abs(np.mean([box[1] + box[3] for box in boxes]) / 2 - 50) < 2


@pytest.mark.parametrize(("size", "expected"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))])
def test_an_image_too_elongated_for_any_box_is_cropped_at_the_center(size, expected):
    view = RandomResizedCropFlip((8, 8), scale=(0.9, 1.0), generator=generator())
    assert view.random_box(*size) == expected


def test_the_smallest_image_is_enlarged():
    assert RandomResizedCropFlip((8, 6))(PILImage.new("RGB", (1, 1))).size == (6, 8)


@pytest.mark.parametrize(("flip", "expected"), [(0.0, "left"), (1.0, "right")])
def test_images_are_flipped_with_the_given_probability(flip, expected):
    half = PILImage.new("RGB", (8, 8))
    half.paste("white", (0, 0, 4, 8))
    view = RandomResizedCropFlip((8, 8), scale=(1, 1), ratio=(1, 1), flip=flip)(half)
    assert view.getpixel((0 if expected == "left" else 7, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"scale": (0.5, 1.2)}, "scale"), ({"ratio": (0, 1)}, "ratio"), ({"flip": 2}, "flip")],
)
def test_invalid_ranges_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomResizedCropFlip((8, 8), **arguments)


def test_a_transformed_dataset_can_be_pickled_for_data_loader_workers(dataset, image_processor):
    copied = pickle.loads(pickle.dumps(with_pixel_values(dataset, image_processor, augment=True)))
    assert copied[0]["pixel_values"].shape == (3, 48, 48)


@pytest.mark.parametrize("kind", ["paths", "bytes", "arrays"])
def test_a_column_that_is_no_image_column_is_told_how_to_become_one(
    kind, image, image_processor, classifier, tmp_path
):
    image.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    given = {"paths": path, "bytes": (tmp_path / "a.png").read_bytes(), "arrays": np.asarray(image).tolist()}[kind]
    rows = Dataset.from_dict({"image": [given], "label": [0]})
    for use in (lambda: with_pixel_values(rows, image_processor), lambda: cache_image_embeds(rows, classifier,
                image_processor)):  # fmt: skip
        with pytest.raises(TypeError, match=r"must have the type Image.*cast_column\('image', datasets.Image\(\)\)"):
            use()
    if kind != "arrays":
        assert len(with_pixel_values(rows.cast_column("image", Image()), image_processor)[:]["pixel_values"]) == 1
