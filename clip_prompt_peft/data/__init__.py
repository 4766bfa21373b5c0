"""From any image data set to what the classifier is tuned on."""

from .class_names import class_names_of, clean_class_name
from .few_shot import sample_few_shot, sample_few_shot_splits
from .image_embeds import cache_image_embeds
from .loading import load_image_dataset
from .splits import hold_out
from .standardize import standardize
from .transforms import RandomResizedCropFlip, with_pixel_values


__all__ = [
    "RandomResizedCropFlip",
    "cache_image_embeds",
    "class_names_of",
    "clean_class_name",
    "hold_out",
    "load_image_dataset",
    "sample_few_shot",
    "sample_few_shot_splits",
    "standardize",
    "with_pixel_values",
]
