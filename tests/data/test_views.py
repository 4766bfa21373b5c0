"""Random views of images for test-time tuning."""

import pytest
import torch
from families import FAMILIES
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil

from clip_prompt_peft.data import RandomViews
from clip_prompt_peft.data.views import OPERATIONS
from clip_prompt_peft.image_files import process_images


@pytest.fixture
def processor():
    return CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )


@pytest.fixture
def image():
    """Red from left to right, green from top to bottom."""
    across = Image.linear_gradient("L").resize((40, 32)).rotate(90).resize((40, 32))
    down = Image.linear_gradient("L").resize((40, 32))
    return Image.merge("RGB", [across, down, Image.new("L", (40, 32), 128)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_first_view_is_that_of_the_processor_and_the_others_are_crops(processor, image):
    views = RandomViews(processor, generator=generator())([image, image.rotate(180)])
    assert views.shape == (2, 64, 3, 16, 16)
    assert_close(views[0, :1], process_images(processor, [image])["pixel_values"])
    blue = views[:, :, 2]
    assert_close(blue, torch.full_like(blue, 128 / 255), atol=1e-3, rtol=0)
    assert len({tuple(view.flatten().tolist()) for view in views[0]}) == 64
    ranges = views[0, 1:, 0].amax(dim=(1, 2)) - views[0, 1:, 0].amin(dim=(1, 2))
    assert ranges.min() < 0.4 < 0.8 < ranges.max()  # from a twelfth of the image to all of it
    rising = (views[0, 1:, 0, :, -1] > views[0, 1:, 0, :, 0]).all(dim=1).sum()
    assert 15 < rising < 48  # about half of them are flipped
    assert (views[0, 1:, 1, -1] > views[0, 1:, 1, 0]).all() or (views[0, 1:, 1, -1] < views[0, 1:, 1, 0]).all()


def test_they_are_resized_bilinearly(processor):
    """Bicubic resizing would go beyond the values at an edge."""
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    image.paste((200, 200, 200), (0, 0, 4, 8))
    views = RandomViews(processor, generator=generator())([image])[0, 1:]
    assert views.min() >= 100 / 255 - 1e-3 and views.max() <= 200 / 255 + 1e-3


def test_a_generator_makes_them_reproducible(processor, image):
    first, same, other = (RandomViews(processor, 5, generator=generator(seed))([image]) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_augmix_mixes_the_crop_with_changed_ones(processor, image):
    plain, mixed = (RandomViews(processor, 30, augmix, generator(1))([image])[0] for augmix in (False, True))
    assert torch.equal(plain[0], mixed[0])  # the image itself stays
    assert mixed.shape == plain.shape
    assert mixed.min() >= -1e-5 and mixed.max() <= 1 + 1e-5  # weights are positive and have a sum of 1
    changes = (mixed[1:] - plain[1:]).abs().amax(dim=(1, 2, 3))
    assert (changes > 0.02).sum() > 12 and changes.mean() < 0.5  # the crops are the same, and stay recognizable


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_operations_of_augmix_keep_the_size_and_are_mild(operation, image):
    for numbers in ([0.01, 0.2], [1.0, 0.9]):
        changed = operation(image, numbers)
        assert changed.size == image.size and changed.mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_other_modes_become_rgb(mode, processor, image):
    assert RandomViews(processor, 3)([image.convert(mode)]).shape == (1, 3, 3, 16, 16)


def test_one_view_is_the_image_itself(processor, image):
    assert RandomViews(processor, 1)([image]).shape == (1, 1, 3, 16, 16)


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_numbers_of_views_that_make_no_sense_are_refused(number, processor):
    with pytest.raises(ValueError, match=f"num_views must be a positive integer, got {number}"):
        RandomViews(processor, number)


def test_processors_without_one_size_are_refused(image):
    keeping = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(ValueError, match="one image at a time"):
        RandomViews(keeping, 2)([image, image.rotate(90, expand=True)])
    with pytest.raises(ValueError, match="patches"):
        RandomViews(FAMILIES["Siglip2"].image_processor, 2)([image])
    with pytest.raises(ValueError, match="no images"):
        RandomViews(keeping, 2)([])
