"""The datasets that the few-shot literature on CLIP evaluates on, and the icons that come with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from datasets import ClassLabel, Dataset, DatasetDict

from ..assets import ASSETS
from .columns import LABEL, clean_class_name
from .few_shot import keep_classes
from .sources import load_image_dataset


STYLES = ("fluenthc", "noto", "fluent3d")


@dataclass(frozen=True)
class KnownDataset:
    """
    A dataset of the literature: where to find it, its prompt template and its class names.

    Attributes:
        title (`str`):
            The name of the dataset in papers.
        num_classes (`int`):
            The number of classes that the literature uses.
        template (`str`):
            The prompt template of CoOp.
        hub_id (`str`):
            A copy of the dataset on the Hub.
        image_column, label_column (`str`):
            The names of the columns of that copy.
        zhou_split (`str`, *optional*):
            The name of its published split, see [`load_zhou_split`].
        clip_benchmark (`str`, *optional*):
            A copy on the Hub in the layout of [`load_clip_benchmark`].
        classes_of (`str`, *optional*):
            The short name of the dataset whose classes, or a subset of them, this dataset shares.
        left_out (`list[str]`):
            The classes that the literature leaves out.
        class_names (`Mapping[str, str]`):
            Label names and the class names that replace them.
        split_camel_case (`bool`):
            Whether label names are words in camel case.
    """

    title: str
    num_classes: int
    template: str
    hub_id: str
    image_column: str
    label_column: str
    zhou_split: str | None = None
    clip_benchmark: str | None = None
    classes_of: str | None = None
    left_out: list[str] = field(default_factory=list)
    class_names: Mapping[str, str] = field(default_factory=dict)
    split_camel_case: bool = False

    def fix_class_names(self, dataset: Dataset) -> Dataset:
        """Drops the classes that the literature leaves out and gives the others the class names of the literature."""
        names = [name for name in dataset.features[LABEL].names if name not in self.left_out]
        dataset = keep_classes(dataset, names)
        fixed = [self.class_names.get(name) or clean_class_name(name, self.split_camel_case) for name in names]
        features = dataset.features.copy()
        features[LABEL] = ClassLabel(names=fixed)
        return dataset.cast(features)


@cache
def known_datasets() -> Mapping[str, KnownDataset]:
    """Returns the eleven datasets of CoOp and four variants of ImageNet, by short name."""
    content = json.loads((files(__package__) / "known_datasets.json").read_text())
    return {name: KnownDataset(**entry) for name, entry in content["datasets"].items()}


def load_known_dataset(name: str, **load_kwargs) -> DatasetDict:
    """
    Loads one of [`known_datasets`] from the Hub, with the class names of the literature.

    Args:
        name (`str`):
            The short name of the dataset.
        load_kwargs (*optional*):
            Additional keyword arguments passed to `datasets.load_dataset` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        `datasets.DatasetDict`: The splits, with the columns `image` and `label`.

    Raises:
        ValueError: If the name is unknown, or if the copy on the Hub has no class names.
    """
    known = known_datasets()
    if name not in known:
        raise ValueError(f"There is no dataset {name!r} in the table; there are {', '.join(known)}.")
    entry = known[name]
    if entry.hub_id == entry.clip_benchmark:
        raise ValueError(
            f"{entry.hub_id!r}, the copy of {entry.title} on the Hub, has no class names. Download it (`hf download "
            f"--repo-type dataset {entry.hub_id} --local-dir FOLDER`) and use load_clip_benchmark(FOLDER)."
        )
    splits = load_image_dataset(
        entry.hub_id, image_column=entry.image_column, label_column=entry.label_column, **load_kwargs
    )
    return DatasetDict({split: entry.fix_class_names(dataset) for split, dataset in splits.items()})


def load_style(style: str) -> DatasetDict:
    """
    Loads the icons of 12 classes that come with the package, drawn in one style.

    Args:
        style (`str`):
            One of `"fluenthc"`, `"noto"` and `"fluent3d"`.

    Returns:
        `datasets.DatasetDict`: The splits `train` (about 187 icons) and `test` (267 other icons).
    """
    paths = {split: str(ASSETS / "emoji" / f"{style}-{split}.parquet") for split in ("train", "test")}
    return load_image_dataset(files=paths)
