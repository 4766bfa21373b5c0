"""Loading of an image dataset from any source."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from zipfile import BadZipFile

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..file_contents import advice_for, foreign_content
from ..image_files import list_images
from .columns import is_image
from .folders import load_class_folders
from .formats import check_file, check_folder, load_clip_benchmark, load_zhou_split
from .found_paths import with_found_paths
from .path_tables import (
    ROWS,
    TABLES,
    holds_paths,
    load_metadata_folder,
    load_path_tables,
    metadata_among,
    metadata_files,
    read_files,
    split_by_folder,
)
from .row_files import check_labels_of_builder, check_same_labels, find_builder, tables_of, warn_of_guessed_types
from .splits import split_by_column, split_folders
from .standard import standardize
from .text_tables import unreadable


logger = logging.getLogger(__name__)

DATASET_STATE, DATASET_DICT = "state.json", "dataset_dict.json"  # what marks a folder of `save_to_disk`
OF_ROWS = {*ROWS, ".tar"}  # endings of files that only `datasets` reads
OF_ROWS_OR_IMAGES = {".zip", ".gz", ".csv", ".json", ".jsonl"}  # they may lie beside images, too


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    folders: Mapping[str, str | os.PathLike] | None = None,
    files: Mapping[str, str | os.PathLike | Sequence] | None = None,
    zhou_split: str | None = None,
    image_dir: str | None = None,
    webdataset_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **load_kwargs,
) -> DatasetDict:
    """
    Loads a dataset from the Hub, from folders of images, parquet or arrow files, a published split, or tar files.

    Args:
        dataset_name (`str`, *optional*):
            A dataset id on the Hub, or a folder: of classes, of splits with classes, or with a metadata file, which
            are read as `folders`, one that `save_to_disk` wrote, or else one that `datasets.load_dataset` can read.
        dataset_config_name (`str`, *optional*):
            The configuration of the dataset on the Hub.
        folders (`Mapping[str, str]`, *optional*):
            The folder of each split, with one sub-folder of images per class, e.g. `{"train": "pets/train"}`, see
            [`load_class_folders`], with a `metadata.csv`, `.jsonl` or `.parquet` as in the `imagefolder` format, or
            written by `Dataset.save_to_disk`.
        files (`Mapping[str, str]` or `Mapping[str, Sequence[str]]`, *optional*):
            The parquet or arrow file of each split, or a list of its shards. Or a csv, tsv or jsonl file of paths,
            relative to its folder, and class names, see [`load_path_tables`].
        zhou_split, image_dir (`str`, *optional*):
            A published split and the folder of its images, see [`load_zhou_split`].
        webdataset_dir (`str`, *optional*):
            A folder in the layout of CLIP_benchmark, see [`load_clip_benchmark`].
        image_column, label_column (`str`, *optional*):
            The names of the columns. By default, they are determined from the column types, see [`find_image_column`]
            and [`find_label_column`].
        load_kwargs (*optional*):
            Additional keyword arguments passed to `datasets.load_dataset` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        `datasets.DatasetDict`: The splits with the columns `image` and `label` (a `ClassLabel`), except those without
        labels. If there is `train` only, a column `split` whose values are names of splits divides it.

    Raises:
        ValueError: If there is not exactly one source, if a folder or file is missing or empty, if a column cannot be
            determined, if files that are read together have other classes or another order of them, or if `train` is
            missing or lacks a class of another split.
    """
    if sum(bool(source) for source in (dataset_name, folders, files, zhou_split, webdataset_dir)) != 1:
        raise ValueError("Give exactly one of dataset_name, folders, files, zhou_split and webdataset_dir.")
    for name, given in (("folders", folders), ("files", files)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{name} names what each split is read from, such as {{'train': {given!r}}}; got {given!r}."
            )
    if load_kwargs.get("split") is not None:
        raise ValueError(
            f"split={load_kwargs['split']!r} would load one split without the others; leave it out, and take the "
            "split from the result."
        )
    if bool(zhou_split) != bool(image_dir):
        raise ValueError("zhou_split and image_dir go together: the paths in the file are relative to the folder.")
    if folders:
        splits = _load_folders(folders, label_column, load_kwargs)
    elif files:
        splits = _load_files(files, image_column, label_column, load_kwargs)
    elif zhou_split:
        splits = load_zhou_split(zhou_split, image_dir)
    elif webdataset_dir:
        splits = load_clip_benchmark(webdataset_dir, **load_kwargs)
    else:
        name = os.fspath(dataset_name)
        splits = _load_named(name, dataset_config_name, image_column, label_column, load_kwargs)
    splits = split_by_column(splits, (image_column, label_column))
    splits = standardize(splits, image_column, label_column)
    if load_kwargs.get("streaming") and isinstance(splits, DatasetDict):  # only the paths have been read
        return IterableDatasetDict({split: dataset.to_iterable_dataset() for split, dataset in splits.items()})
    return splits


def _load_folders(
    folders: Mapping[str, str | os.PathLike], label_column: str | None, load_kwargs: dict
) -> DatasetDict:
    paths = {split: os.path.expanduser(os.fspath(folder)) for split, folder in folders.items()}
    for folder in paths.values():
        check_folder(folder)
    if any(map(_is_saved_dataset, paths.values())):
        return _load_saved(paths)
    cache_dir = load_kwargs.get("cache_dir")
    with_metadata = {split: path for split, path in paths.items() if metadata_files(path)}
    without = {split: path for split, path in paths.items() if split not in with_metadata}
    if with_metadata and without:
        raise ValueError(
            f"{', '.join(with_metadata.values())} has a metadata file, but {', '.join(without.values())} has none. "
            "Give each folder one, or none and folders of classes."
        )
    splits = DatasetDict(
        {split: load_metadata_folder(path, label_column, cache_dir) for split, path in with_metadata.items()}
    )
    return splits or load_class_folders(paths, cache_dir)


def _is_saved_dataset(folder: str) -> bool:
    """Returns whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (DATASET_STATE, DATASET_DICT))


def _load_saved(folders: Mapping[str, str]) -> DatasetDict:
    loaded = {}
    for split, folder in folders.items():
        if not _is_saved_dataset(folder):
            raise ValueError(f"{folder!r} was not written by save_to_disk, but another of the folders was.")
        dataset = load_from_disk(folder)
        if isinstance(dataset, DatasetDict):
            raise ValueError(
                f"{folder!r} holds the splits {', '.join(dataset)}, where one split was expected. Give the folder of "
                f"one, such as {os.path.join(folder, next(iter(dataset)))!r}, or the folder alone, as dataset_name."
            )
        loaded[split] = dataset
    return DatasetDict(loaded)


def _load_named(
    name: str, config: str | None, image_column: str | None, label_column: str | None, load_kwargs: dict
) -> DatasetDict:
    """Loads a data set of the Hub or a local folder."""
    settings = {key: value for key, value in load_kwargs.items() if value is not None}
    folder = os.path.expanduser(settings.get("data_dir", "") if name == "imagefolder" else name)
    folder = folder.rstrip(os.sep) or folder
    if _is_saved_dataset(folder):
        dataset = load_from_disk(folder)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    if config is None and "data_files" not in settings and os.path.isdir(folder) and not _is_repository(folder):
        splits = split_folders(folder)
        if splits != {"train": folder} and any(os.path.dirname(file) == folder for file in metadata_files(folder)):
            rows = load_metadata_folder(folder, label_column, settings.get("cache_dir"))  # one file for all splits
            return split_by_folder(rows, splits)
        return _load_folders(splits, label_column, load_kwargs)
    if os.path.isfile(folder):
        check_folder(folder)
    try:
        builder = None if name == "imagefolder" else find_builder(name, config, load_kwargs)
        if builder is not None:
            if tables := tables_of(builder):
                return _load_files(tables, image_column, label_column, load_kwargs)
            check_labels_of_builder(builder, label_column, load_kwargs)
        splits = load_dataset(name, config, **load_kwargs)
    except StopIteration as error:  # has no text
        raise ValueError(f"Cannot read {name!r}: a json file in it is empty. Write it again, or remove it.") from error
    except (DatasetGenerationError, BadZipFile, pa.ArrowInvalid) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # which has no text
        if reason is None or (isinstance(reason, OSError) and reason.errno is not None):  # no space on the disk
            raise
        others = [path for path in list_images(folder)[1] if foreign_content(path)] if os.path.isdir(folder) else []
        raise unreadable(others[:1] or [name], "data of images", reason) from error
    warn_of_guessed_types(splits, label_column)
    return splits


def _is_repository(folder: str) -> bool:
    """Returns whether a folder holds what only `datasets` reads: files of rows, archives, or a layout in a card."""
    card = os.path.join(folder, "README.md")
    if os.path.isfile(card):
        with open(card, encoding="utf-8", errors="replace") as file:
            if re.search(r"^(configs|dataset_info):", file.read(), re.MULTILINE):
                return True
    images, others = list_images(folder)
    metadata = metadata_among(others)
    wanted = OF_ROWS if images else OF_ROWS | OF_ROWS_OR_IMAGES
    rows = [path for path in others if path not in metadata and os.path.splitext(path)[1].lower() in wanted]
    in_class_folders = len({os.path.dirname(path) for path in images} - {folder}) > 1
    if not rows or in_class_folders:  # the folders are read, and the file is told to be skipped
        return False
    if images:
        logger.warning(
            "%r is read by `datasets`, since it holds %r; its %d images, such as %r, may be left out.",
            folder,
            rows[0],
            len(images),
            images[0],
        )
    return True


def _load_files(
    files: Mapping[str, str | os.PathLike | Sequence],
    image_column: str | None,
    label_column: str | None,
    load_kwargs: dict,
) -> DatasetDict:
    paths = {split: _paths(given) for split, given in files.items()}
    all_paths = [path for of_split in paths.values() for path in of_split]
    for path in all_paths:
        check_file(path)
    extensions = {os.path.splitext(path)[1].lower() for path in all_paths}
    if len(extensions) != 1 or not extensions <= {*ROWS, *TABLES}:
        known = ", ".join((*ROWS, *TABLES))
        others = [path for path in all_paths if os.path.splitext(path)[1].lower() not in {*ROWS, *TABLES}]
        advice = advice_for(others[0]) if others else ""
        raise ValueError(f"Files must be of one format, {known}; got {', '.join(all_paths) or 'no files'}.{advice}")
    if holds_paths(all_paths[0], image_column):
        cache_dir = load_kwargs.get("cache_dir")
        tables = {
            split: load_path_tables(of_split, image_column, label_column, cache_dir)
            for split, of_split in paths.items()
        }
        return DatasetDict(tables)
    builder, _ = ROWS[extensions.pop()]
    splits = IterableDatasetDict() if load_kwargs.get("streaming") else DatasetDict()
    for split, of_split in paths.items():  # one by one, or `datasets` gives all files the class names of the first
        check_same_labels(of_split, label_column)
        splits[split] = _read_rows(builder, of_split, split, image_column, load_kwargs)
    return splits


def _read_rows(
    builder: str, files: list[str], split: str, image_column: str | None, load_kwargs: dict
) -> Dataset | IterableDataset:
    """Reads files of images. Images that are only paths are looked for in the folder of the files."""
    rows = read_files(builder, files, split, **load_kwargs)
    if isinstance(rows, Dataset):
        for column in [image_column] if image_column in rows.features else list(rows.features):
            if is_image(rows.features[column]):
                rows = with_found_paths(rows, files[0], column)
    return rows


def _paths(given: str | os.PathLike | Sequence) -> list[str]:
    return [
        os.path.expanduser(os.fspath(path)) for path in ([given] if isinstance(given, (str, os.PathLike)) else given)
    ]
