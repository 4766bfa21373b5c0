"""The data sets that the few-shot literature of CLIP compares itself on."""

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


@dataclass(frozen=True)
class KnownDataset:
    """
    What is particular about a data set.

    Attributes:
        title: as papers call it.
        num_classes: that the literature uses.
        template: CoOp's prompt.
        hub_id: a copy of it on the Hub.
        image_column, label_column: of that copy.
        zhou_split: name of its published split, see [`load_zhou_split`]; `None` if there is none.
        clip_benchmark: its copy in the layout of [`load_clip_benchmark`]; `None` if there is none.
        classes_of: the data set whose classes, or some of them, these are.
        left_out: classes that the literature leaves out.
        class_names: label names that are to be read otherwise.
        split_camel_case: whether label names are words written together.
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
        """Leaves out what the literature leaves out, and calls the other classes as it does."""
        names = [name for name in dataset.features[LABEL].names if name not in self.left_out]
        dataset = keep_classes(dataset, names)
        fixed = [self.class_names.get(name) or clean_class_name(name, self.split_camel_case) for name in names]
        features = dataset.features.copy()
        features[LABEL] = ClassLabel(names=fixed)
        return dataset.cast(features)


@cache
def known_datasets() -> Mapping[str, KnownDataset]:
    """The table, by short name: the eleven sets of CoOp and four variants of ImageNet."""
    content = json.loads((files(__package__) / "known_datasets.json").read_text())
    return {name: KnownDataset(**entry) for name, entry in content["datasets"].items()}


def load_known_dataset(name: str, **load_kwargs) -> DatasetDict:
    """Loads a data set of the table from the Hub, with the class names of the literature.

    Args:
        name: one of [`known_datasets`].
        load_kwargs: for `datasets.load_dataset` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        The splits, with the columns `image` and `label`.

    Raises:
        ValueError: unknown name; a set for which there is only a copy with numbers for labels.
    """
    known = known_datasets()
    if name not in known:
        raise ValueError(f"There is no data set {name!r} in the table; there are {', '.join(known)}.")
    entry = known[name]
    if entry.hub_id == entry.clip_benchmark:
        raise ValueError(
            f"The copy of {entry.title} on the Hub, {entry.hub_id!r}, has numbers for labels; download it with "
            f"`hf download --repo-type dataset {entry.hub_id} --local-dir FOLDER` and read it with "
            "load_clip_benchmark(FOLDER), which knows the names."
        )
    splits = load_image_dataset(
        entry.hub_id, image_column=entry.image_column, label_column=entry.label_column, **load_kwargs
    )
    return DatasetDict({split: entry.fix_class_names(dataset) for split, dataset in splits.items()})


STYLES = ("fluenthc", "noto", "fluent3d")


SPLITS = ("train", "test")


def load_style(style: str) -> DatasetDict:
    """Emoji of 12 classes, drawn in one style: about 187 for training (`train`) and 267 others (`test`)."""
    return load_image_dataset(files={split: str(ASSETS / "emoji" / f"{style}-{split}.parquet") for split in SPLITS})
