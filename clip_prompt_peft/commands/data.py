"""The arguments that name the images, their checks, and the test images that a training holds out for them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict

from clip_prompt_cli.fields import DataFields

from ..data import class_names_of, hold_out, load_image_dataset, shared_images, split_by_list
from ..data.formats import check_file, check_folder
from ..data.known_datasets import STYLES, load_style
from ..data.splits import SPLIT_OF


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
HELD_OUT = "held out of train"
# Arguments that belong to a source: without it they would be ignored.
BELONGS_TO = {
    "dataset_config_name": "dataset_name",
    "image_dir": "zhou_split",
    "zhou_split": "image_dir",
    "test_list": "train_dir",
}


@dataclass
class DataArguments(DataFields):
    """The images; by default the embedded pictures."""

    def source(self, kind: Literal["dir", "file"]) -> dict[str, str]:
        """Returns the given folders or files by split."""
        paths = {split: getattr(self, f"{split}_{kind}") for split in SPLITS}
        return {split: path for split, path in paths.items() if path is not None}

    @property
    def sources(self) -> list:
        """The sources that were given; at most one is allowed."""
        known = self.dataset_name, self.source("dir"), self.source("file"), self.zhou_split, self.webdataset_dir
        return [source for source in known if source]

    @property
    def is_embedded(self) -> bool:
        """Whether the embedded pictures are meant."""
        return not self.sources

    @property
    def name(self) -> str:
        """The source of the training data."""
        source = self.sources[0] if self.sources else self.style
        return source if isinstance(source, str) else next(iter(source.values()))

    @property
    def short_name(self) -> str:
        """The name without the folders that it lies in; of `pets/train` it is `pets`."""
        if self.is_embedded or self.dataset_name and not os.path.exists(self.dataset_name):
            return self.name
        path = Path(os.path.abspath(self.name))
        return path.parent.name if path.name.lower() in SPLIT_OF and path.parent.name else path.name

    def as_record(self) -> dict[str, object]:
        """Returns the arguments that are not `None` as JSON, with paths that are valid in any working directory."""
        record = {field.name: getattr(self, field.name) for field in fields(DataArguments)}
        for name, value in record.items():
            is_path = name.rpartition("_")[2] in ("dir", "file", "list") or name in ("zhou_split", "dataset_name")
            if is_path and value is not None and os.path.exists(value):
                record[name] = os.path.abspath(value)
        if not self.is_embedded:
            del record["style"]
        return {name: value for name, value in record.items() if value is not None}

    def check(self, given: set[str], needs_train: bool = True) -> None:
        """Checks what can be said before any image is read.

        Args:
            given (`set[str]`):
                The names of the arguments that the user gave.
            needs_train (`bool`, *optional*, defaults to `True`):
                Whether training images are needed beside others.

        Raises:
            ValueError: If arguments contradict each other, would be ignored, or name what is not there.
        """
        if len(self.sources) > 1:
            raise ValueError(
                "Give only one of --dataset_name, --train_dir ..., --train_file ..., --zhou_split and "
                "--webdataset_dir."
            )
        for name, owner in BELONGS_TO.items():
            if getattr(self, name) is not None and getattr(self, owner) is None:
                raise ValueError(f"--{name} goes together with --{owner}, which is missing.")
        if self.is_embedded:
            ignored = sorted(given & {"image_column_name", "label_column_name", "train_val_split"})
            if ignored:
                raise ValueError(f"--{ignored[0]} is for data of your own; add --train_dir, for instance.")
        elif "style" in given:
            raise ValueError(f"--style is of the embedded pictures; leave it out, or leave out {self.name!r}.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split must lie between 0 and 1, got {self.train_val_split}.")
        if self.test_list is not None and self.test_dir is not None:
            raise ValueError("--test_list and --test_dir both say what to test on; give one of them.")
        if self.test_list is not None and not os.path.isfile(self.test_list):
            raise ValueError(f"--test_list: The file {self.test_list!r} does not exist.")
        for kind in ("dir", "file"):
            self._check_paths(kind, needs_train)

    def _check_paths(self, kind: Literal["dir", "file"], needs_train: bool) -> None:
        paths = self.source(kind)
        if paths and needs_train and "train" not in paths:
            raise ValueError(f"--{next(iter(paths))}_{kind} needs --train_{kind} beside it, the training images.")
        for split, path in paths.items():
            flag = f"--{split}_{kind}"
            try:
                (check_folder if kind == "dir" else check_file)(path)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error
            if kind == "dir":
                _check_no_splits_inside(flag, path)
        if "train" not in paths:
            return
        train = os.path.realpath(paths["train"])
        for split, path in paths.items():
            other = os.path.realpath(path)
            if split != "train" and other == train:
                logger.warning(
                    "--%s_%s is the same as --train_%s: the images are tested on that are trained on.",
                    split,
                    kind,
                    kind,
                )
            elif split != "train" and other.startswith(train + os.sep):
                raise ValueError(
                    f"--{split}_{kind} {path!r} lies inside of --train_{kind} {paths['train']!r}, so it would "
                    f"be trained on the images of {split}. Name the folder of the training images alone."
                )


def _check_no_splits_inside(flag: str, folder: str) -> None:
    """Raises `ValueError` if the sub-folders of an image folder are splits and not classes."""
    splits = {
        entry.name: entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name.lower() in SPLIT_OF
    }
    is_nested = any(entry.is_dir() for path in splits.values() for entry in os.scandir(path))
    names = sorted(splits)
    for_training = [name for name in names if SPLIT_OF[name.lower()] == "train"]
    for_tests = [name for name in names if name not in for_training]
    if is_nested or (for_training and for_tests):
        train, test = next(iter(for_training), "train"), next(iter(for_tests), "test")
        raise ValueError(
            f"{flag} {folder!r} holds {', '.join(names)}, not classes: training and test images "
            "would be mixed. Name the folders of each split: --train_dir "
            f"{os.path.join(folder, train)!r} --test_dir {os.path.join(folder, test)!r}."
        )


def load_data(
    data_args: DataArguments, cache_dir: str | None = None, token: str | None = None
) -> tuple[DatasetDict, dict[str, Dataset]]:
    """Returns the splits to draw from (`train`, and `validation` if there is one), and the test sets by name."""
    if data_args.is_embedded:
        styles = {style: load_style(style) for style in (data_args.style, *STYLES)}
        splits = DatasetDict(train=styles[data_args.style]["train"])
        return splits, {style: dataset["test"] for style, dataset in styles.items()}
    splits = load_image_dataset(
        data_args.dataset_name,
        data_args.dataset_config_name,
        folders=data_args.source("dir"),
        files=data_args.source("file"),
        zhou_split=data_args.zhou_split,
        image_dir=data_args.image_dir,
        webdataset_dir=data_args.webdataset_dir,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
        cache_dir=cache_dir,
        token=token,
    )
    if data_args.test_list is not None:
        splits["train"], splits["test"] = split_by_list(splits["train"], data_args.train_dir, data_args.test_list)
    return splits, choose_test_set(splits, data_args.train_val_split)


def choose_test_set(splits: DatasetDict, train_val_split: float) -> dict[str, Dataset]:
    """Returns `test` or else `validation`, or else moves a part of `train` out of the splits."""
    for name in ("test", "validation"):
        if name in splits:
            return {name: splits[name]}
    counts = images_per_class(splits["train"])
    few = [name for name, count in counts.items() if count < 2]
    if few:
        raise ValueError(
            f"There are no test images, and the classes with a single training image ({', '.join(few[:10])}) have "
            "none to spare. Give images to test on (--test_dir, --test_list or --test_file), or two images of every "
            "class."
        )
    try:
        splits["train"], held_out = hold_out(splits["train"], train_val_split)
    except ValueError as error:
        raise ValueError(
            f"There are no test images, and --train_val_split {train_val_split} of the training images is not enough: "
            f"{error} A larger --train_val_split, or --test_dir or --test_file, does."
        ) from error
    return {HELD_OUT: held_out}


def find_test_set(data_args: DataArguments, split: str | None) -> tuple[str, Dataset]:
    """Returns the name and the images of the split to test on: by default, that of the command `train`.

    Raises:
        ValueError: If there is no such split.
    """
    for kind in ("dir", "file"):
        paths = data_args.source(kind)
        if paths and "train" not in paths:  # any images with labels can be tested on
            name, path = next((name, paths[name]) for name in ("test", "validation") if name in paths)
            # as training and as test images, so that none of them are held out
            alone = {f"train_{kind}": path, f"test_{kind}": path, f"validation_{kind}": None}
            splits, _ = load_data(replace(data_args, **alone))
            return name, splits["test"]
    splits, test_sets = load_data(data_args)
    available = {**test_sets, **splits}
    name = next(iter(test_sets)) if split is None else split
    if data_args.is_embedded and split == "test":
        name = data_args.style
    if name not in available:
        raise ValueError(f"There is no --split {name!r} in the data; there are {', '.join(available)}.")
    return name, available[name]


def warn_of_shared_images(used: Dataset, others: Mapping[str, Dataset], kind: str = "training") -> None:
    """Warns of images that are tested on and equal those that are used in training, and of those not compared."""
    for name, dataset in others.items():
        shared = shared_images(used, dataset)
        if shared.rows:
            pairs = ", ".join(f"{of_test} (equal to {of_train})" for of_test, of_train in shared.names[:3])
            logger.warning(
                "%d of the %d images of %r equal %s images, so its accuracy says little about new ones: %s%s. "
                "Leave them out of one of the two.",
                len({row for row, _ in shared.rows}),
                len(dataset),
                name,
                kind,
                pairs,
                ", ..." if len(shared.rows) > 3 else "",
            )
        if shared.num_skipped:
            logger.warning(
                "%d of the %s images and those of %r were not compared: they are remote, or too many or too large "
                "together. clip_prompt_peft.data.shared_images compares more.",
                shared.num_skipped,
                kind,
                name,
            )


def images_per_class(dataset: Dataset) -> dict[str, int]:
    """Returns the number of images of each class that has any, by name."""
    names = class_names_of(dataset)
    return {names[label]: count for label, count in sorted(Counter(dataset["label"][:]).items())}
