"""From any image data set to what the classifier is tuned on."""

from .class_names import class_names_of, clean_class_name
from .few_shot import sample_few_shot, sample_few_shot_splits
from .image_embeds import compute_image_embeds
from .loading import load_image_dataset
from .splits import base_new_names, hold_out, keep_classes, split_base_new
from .standardize import standardize
from .transforms import RandomResizedCropFlip, with_pixel_values


__all__ = [
    "RandomResizedCropFlip",
    "base_new_names",
    "class_names_of",
    "clean_class_name",
    "compute_image_embeds",
    "hold_out",
    "keep_classes",
    "load_image_dataset",
    "sample_few_shot",
    "sample_few_shot_splits",
    "split_base_new",
    "standardize",
    "with_pixel_values",
]
