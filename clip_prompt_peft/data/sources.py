"""Reading image data sets from where they are: the Hub, folders, files."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping

from datasets import DatasetDict, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .clip_benchmark import load_clip_benchmark
from .standardize import LABEL, standardize
from .zhou_split import load_zhou_split


FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    folders: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    zhou_split: str | None = None,
    image_dir: str | None = None,
    webdataset_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **load_kwargs,
) -> DatasetDict:
    """
    Reads a data set of the Hub, folders of images, files of rows, a published split, or tar files.

    Args:
        dataset_name: Hub id, or a folder that `datasets.load_dataset` understands.
        dataset_config_name: its configuration.
        folders: split name to folder, with one sub-folder of images per class: `{"train": "pets/train"}`.
        files: split name to parquet or arrow file.
        zhou_split, image_dir: a published split and the folder of its images, see [`load_zhou_split`].
        webdataset_dir: a folder in the layout of CLIP_benchmark, see [`load_clip_benchmark`].
        image_column, label_column: by default found, see [`find_image_column`] and [`find_label_column`].
        load_kwargs: for `datasets.load_dataset` (`revision`, `token`, `cache_dir`, ...).

    Returns:
        The splits, with the columns `image` and `label` (a `ClassLabel`). A split without labels is left out.

    Raises:
        ValueError: none or several sources; a missing or empty folder or file; columns that cannot be found; no
            training split, or labels in another split that it does not have.
    """
    if sum(bool(source) for source in (dataset_name, folders, files, zhou_split, webdataset_dir)) != 1:
        raise ValueError("Give exactly one of dataset_name, folders, files, zhou_split and webdataset_dir.")
    if bool(zhou_split) != bool(image_dir):
        raise ValueError("zhou_split and image_dir go together: the paths in the file are relative to the folder.")
    if folders:
        splits = _load_folders(folders, load_kwargs)
    elif files:
        splits = _load_files(files, load_kwargs)
    elif zhou_split:
        splits = load_zhou_split(zhou_split, image_dir)
    elif webdataset_dir:
        splits = load_clip_benchmark(webdataset_dir, **load_kwargs)
    else:
        splits = load_dataset(dataset_name, dataset_config_name, **load_kwargs)
    return standardize(splits, image_column, label_column)


def _load_folders(folders: Mapping[str, str], load_kwargs: dict) -> DatasetDict:
    for folder in folders.values():
        _check_folder(folder)
    data_files = {split: os.path.join(glob.escape(folder), "**") for split, folder in folders.items()}
    splits = load_dataset("imagefolder", data_files=data_files, **load_kwargs)
    if LABEL not in next(iter(splits.values())).column_names:
        raise ValueError(
            f"No classes were found in {', '.join(folders.values())}. Needed is one sub-folder for each of at least "
            "two classes, with the images right inside: FOLDER/cat/1.jpg, FOLDER/dog/1.jpg, ..."
        )
    return splits


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise ValueError(f"The image folder {folder!r} does not exist.")
    names = (name for _, _, files in os.walk(folder) for name in files)
    if not any(os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS for name in names):
        raise ValueError(f"There are no images in {folder!r}, nor in its sub-folders.")


def _load_files(files: Mapping[str, str], load_kwargs: dict) -> DatasetDict:
    missing = [file for file in files.values() if not os.path.isfile(file)]
    if missing:
        raise ValueError(f"The file {missing[0]!r} does not exist.")
    endings = {os.path.splitext(file)[1].lower() for file in files.values()}
    if len(endings) > 1 or not endings <= set(FILE_FORMATS):
        raise ValueError(
            f"The files must all be of one format, {' or '.join(FILE_FORMATS)}; got {', '.join(files.values())}."
        )
    builder = FILE_FORMATS[endings.pop()]
    # one by one: together, `datasets` would read all files with the class names of the first
    return DatasetDict(
        {
            split: load_dataset(builder, data_files={split: file}, split=split, **load_kwargs)
            for split, file in files.items()
        }
    )
