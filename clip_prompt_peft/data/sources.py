"""Loading of an image dataset from any source into one form: columns `image` and `label`, shared class names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)

from ..image_files import list_images
from ..templates import warn_of_names_without_words
from .columns import (
    IMAGE,
    LABEL,
    as_image_column,
    check_names_differ,
    clean_class_name,
    find_image_column,
    find_label_column,
    is_image,
    is_text,
    plain_name,
    read_labels,
    type_name,
    unlabeled_rows,
)
from .folders import load_class_folders
from .formats import check_file, load_clip_benchmark, load_zhou_split
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
    with_found_paths,
)
from .reading import check_rows
from .row_files import check_labels_of_named, check_same_labels
from .splits import split_by_column, split_folders


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
        splits = _load_named(os.fspath(dataset_name), dataset_config_name, label_column, load_kwargs)
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
        if not os.path.isdir(folder):
            raise ValueError(f"The image folder {folder!r} does not exist.")
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


def _load_named(name: str, config: str | None, label_column: str | None, load_kwargs: dict) -> DatasetDict:
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
    if name != "imagefolder":
        check_labels_of_named(name, config, label_column, load_kwargs)
    try:
        return load_dataset(name, config, **load_kwargs)
    except StopIteration as error:  # has no text
        raise ValueError(f"Cannot read {name!r}: a json file in it is empty. Write it again, or remove it.") from error


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
        raise ValueError(f"Files must be of one format, {known}; got {', '.join(all_paths) or 'no files'}.")
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


def standardize(splits: DatasetDict, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """
    Renames the image and label columns, drops all others, and gives all splits the class names of `train`.

    Args:
        splits (`datasets.DatasetDict`):
            The split `train` and any others.
        image_column, label_column (`str`, *optional*):
            The names of the columns. By default, they are determined from the column types, see [`find_image_column`]
            and [`find_label_column`].

    Returns:
        `datasets.DatasetDict`: The splits with the columns `image` and `label` (a `ClassLabel`), except those without
        labels.

    Raises:
        ValueError: If a column cannot be determined, or if `train` is missing or lacks a class of another split.
    """
    if "train" not in splits:
        raise ValueError(f"The dataset has no split 'train'; its splits are {', '.join(splits)}.")
    train = splits["train"]
    if isinstance(train, IterableDataset):
        return _standardize_streams(splits, image_column, label_column)
    image_column, label_column = _find_columns(train.features, image_column, label_column)
    labels = read_labels(train, label_column)
    trained = set(labels)
    label_feature = train.features[label_column]
    if not isinstance(label_feature, ClassLabel):
        _check_named(labels)
        label_feature = ClassLabel(names=sorted(trained - {None}))
        _check_names(label_feature.names)
    _warn_of_names(label_feature.names)

    standard = DatasetDict()
    for name, split in splits.items():
        split = _select_columns(name, split, {image_column: IMAGE, label_column: LABEL})
        labels = read_labels(split, LABEL)
        if name != "train" and all(label is None or label == -1 for label in labels):
            logger.warning("The split %r has no labels and is left out.", name)
            continue
        is_named = isinstance(train.features[label_column], ClassLabel) and is_text(split.features[LABEL])
        seen = {label_feature.names[label] for label in trained} if is_named else trained
        _check_labels(name, split, labels, label_feature, seen)
        if not isinstance(split.features[LABEL], ClassLabel):
            split = split.cast_column(LABEL, label_feature)
        standard[name] = split
    _warn_of_few_classes(label_feature, set(read_labels(standard["train"], LABEL)))
    return standard


def _find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    if image_column is None or image_column != label_column:
        image_column = find_image_column(features, image_column)
    if image_column != label_column:
        label_column = find_label_column(features, label_column)
    if image_column == label_column:
        raise ValueError(f"The column {image_column!r} cannot be the image column and the label column; name another.")
    return image_column, label_column


def _check_named(labels: list) -> None:
    """Raises a `ValueError` if class names of 'train' hold nothing but spaces."""
    blank = [row for row, name in enumerate(labels) if name is not None and not clean_class_name(name)]
    if blank:
        raise ValueError(
            f"{len(blank)} of the {len(labels)} rows of the split 'train' have an empty class name, "
            f"{labels[blank[0]]!r}, such as row {blank[0]}; name their class, or leave these rows out of the data."
        )


def _check_names(names: list[str]) -> None:
    """Checks class names that come from a column of text, as the names of class folders are checked."""
    check_names_differ(names)
    if "-1" in names:
        logger.warning("'-1' is taken for the name of a class; if it stands for no label, leave these rows out.")


def _warn_of_names(names: list[str]) -> None:
    warn_of_names_without_words([clean_class_name(name) for name in names if name != "-1"])


def _warn_of_few_classes(feature: ClassLabel, trained: set) -> None:
    if len(trained) == 1:
        logger.warning(
            "All images of 'train' are of one class, %r: a classifier that is trained on them alone predicts nothing "
            "else.",
            feature.names[next(iter(trained))],
        )
    unused = [name for label, name in enumerate(feature.names) if label not in trained]
    if unused:
        logger.warning(
            "Classes without images in 'train' (%d of %d): %s. They are predicted by their names alone.",
            len(unused),
            feature.num_classes,
            unused[:10],
        )


def _standardize_streams(
    splits: IterableDatasetDict, image_column: str | None, label_column: str | None
) -> IterableDatasetDict:
    """Does what can be done without reading the labels."""
    features = splits["train"].features
    if features is None:
        raise ValueError(
            "The columns of this stream have no types, so its image and label columns are unknown; cast it to "
            "Features with an Image and a ClassLabel, or load it without streaming=True."
        )
    image_column, label_column = _find_columns(features, image_column, label_column)
    feature = features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} of this stream holds {type_name(feature)}, whose class names are only known "
            "after reading all of it; load it without streaming=True."
        )
    if feature.num_classes == 1:
        logger.warning("The stream has one class only, %r; a classifier needs two.", feature.names[0])
    _warn_of_names(feature.names)
    standard = IterableDatasetDict()
    for name, split in splits.items():
        if split.features.get(label_column) != features[label_column]:
            raise ValueError(f"The stream {name!r} has other classes than 'train'; they must be the same, in order.")
        chosen = {image_column: IMAGE, label_column: LABEL}
        split = split.select_columns(list(chosen)).rename_columns(
            {old: new for old, new in chosen.items() if old != new}
        )
        is_typed = isinstance(split.features[IMAGE], Image)  # perhaps with a mode
        standard[name] = split if is_typed else split.cast_column(IMAGE, Image())
    return standard


def _select_columns(name: str, split: Dataset, new_names: dict[str, str]) -> Dataset:
    missing = [column for column in new_names if column not in split.column_names]
    if missing:
        raise ValueError(
            f"Split {name!r} has no column {missing[0]!r}; its columns are {', '.join(split.column_names)}."
        )
    split = split.select_columns(list(new_names)).rename_columns(new_names)
    if is_text(split.features[LABEL]):
        split = split.cast_column(LABEL, Value("string"))
    split = as_image_column(split)
    check_rows(split)
    return split


def _check_labels(name: str, split: Dataset, labels: list, expected: ClassLabel, trained: set) -> None:
    feature, known = split.features[LABEL], set(expected.names)
    if isinstance(feature, ClassLabel):
        if feature.names != expected.names:
            raise ValueError(
                f"The split {name!r} has the classes {feature.names[:5]}..., but 'train' has {expected.names[:5]}...; "
                "they must be the same, in the same order."
            )
        known = set(range(expected.num_classes))
    missing = unlabeled_rows(labels, feature)
    if missing:
        marked = {labels[row] for row in missing} - {None}
        mark = f" (they are marked by {', '.join(map(str, sorted(marked)))})" if marked else ""
        raise ValueError(
            f"{len(missing)} of the {len(labels)} rows of the split {name!r} have no label{mark}, such as row "
            f"{', '.join(map(str, missing[:5]))}; leave these rows out of the data."
        )
    unknown = [row for row, label in enumerate(labels) if label not in known]
    if unknown:
        first = labels[unknown[0]]
        raise ValueError(
            f"The split {name!r} has {len(unknown)} labels that are no class of 'train', such as {first!r} in row "
            f"{unknown[0]}.{_hint([first], expected.names)}"
        )
    untrained = sorted(set(labels) - trained)
    if untrained:
        names = [expected.names[label] if isinstance(label, int) else label for label in untrained]
        have = {expected.names[label] if isinstance(label, int) else label for label in trained}
        raise ValueError(
            f"The split {name!r} has images of classes that have none in 'train' ({len(untrained)}): "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}.{_hint(names, have)}"
        )


def _hint(names: Iterable, others: Iterable[str]) -> str:
    """Names those of the other classes that are meant, if they are only spelled otherwise."""
    wanted = {plain_name(name) for name in names if isinstance(name, str)}
    alike = [repr(other) for other in sorted(others) if plain_name(other) in wanted]
    spelled = "which differ in case or spaces only, or in how accents are stored; rename one"
    return f" It has {', '.join(alike)}, {spelled}." if alike else ""
