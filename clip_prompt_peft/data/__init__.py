"""Loading, sampling and preprocessing of the image datasets that the classifier is trained and evaluated on."""

from ..image_files import UnreadableImageError
from .columns import class_names_of, clean_class_name
from .duplicates import SharedImages, shared_images
from .few_shot import base_new_names, hold_out, keep_classes, sample_few_shot, sample_few_shot_splits, split_base_new
from .formats import load_clip_benchmark, load_zhou_split, read_clip_benchmark_templates
from .image_embeds import cache_image_embeds
from .images import RandomResizedCropFlip, content_hash, with_pixel_values
from .known_datasets import KnownDataset, known_datasets, load_known_dataset
from .path_lists import split_by_list
from .sources import load_image_dataset
from .standard import standardize
from .teacher_logits import cache_teacher_logits
from .views import RandomViews


__all__ = [
    "KnownDataset",
    "RandomResizedCropFlip",
    "RandomViews",
    "SharedImages",
    "UnreadableImageError",
    "base_new_names",
    "cache_image_embeds",
    "cache_teacher_logits",
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
    "shared_images",
    "split_base_new",
    "split_by_list",
    "standardize",
    "with_pixel_values",
]
