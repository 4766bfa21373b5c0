"""From any image data set to what the classifier is tuned on."""

from .class_names import class_names_of, clean_class_name
from .clip_benchmark import load_clip_benchmark, read_clip_benchmark_templates
from .content_hash import content_hash
from .few_shot import sample_few_shot, sample_few_shot_splits
from .image_embeds import cache_image_embeds
from .known_datasets import KnownDataset, known_datasets, load_known_dataset
from .loading import load_image_dataset
from .splits import base_new_names, hold_out, keep_classes, split_base_new
from .standardize import standardize
from .transforms import RandomResizedCropFlip, UnreadableImageError, with_pixel_values
from .zhou_split import load_zhou_split


__all__ = [
    "KnownDataset",
    "RandomResizedCropFlip",
    "UnreadableImageError",
    "base_new_names",
    "cache_image_embeds",
    "class_names_of",
    "clean_class_name",
    "content_hash",
    "hold_out",
    "keep_classes",
    "known_datasets",
    "load_clip_benchmark",
    "load_image_dataset",
    "load_known_dataset",
    "load_zhou_split",
    "read_clip_benchmark_templates",
    "sample_few_shot",
    "sample_few_shot_splits",
    "split_base_new",
    "standardize",
    "with_pixel_values",
]
