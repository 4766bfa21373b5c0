"""Tables that list image files and their labels: csv, tsv, jsonl, parquet and arrow files, and metadata of folders."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..file_contents import shown
from ..image_files import bytes_of_text, list_images
from .columns import IMAGE, USUAL_LABEL_NAMES, is_bytes, is_image, is_text
from .found_paths import find_beside, hint_at, is_remote
from .text_tables import AS_WRITTEN, check_is_utf_8, read_csv, unreadable


logger = logging.getLogger(__name__)

TABLES = {  # file extension to builder of `datasets` and its settings; those of csv are settings of pandas
    ".csv": ("csv", AS_WRITTEN),
    ".tsv": ("csv", {**AS_WRITTEN, "sep": "\t"}),
    ".jsonl": ("json", {}),
}
ROWS = {".parquet": ("parquet", {}), ".arrow": ("arrow", {})}  # they may hold images, or paths as the tables above
METADATA_FILES = {  # of the `imagefolder` format of `datasets`
    "metadata.csv": TABLES[".csv"],
    "metadata.jsonl": TABLES[".jsonl"],
    "metadata.parquet": ("parquet", {}),
}
PATH_COLUMNS = ("file_name", "filename", "image", "path", "image_path", "filepath", "file")


def metadata_files(folder: str) -> list[str]:
    """Returns the files in a folder, or in its sub-folders, that list its images and their labels."""
    return metadata_among(list_images(folder)[1])


def metadata_among(paths: Sequence[str]) -> list[str]:
    """Returns those of the files that list images and their labels."""
    return [path for path in paths if os.path.basename(path) in METADATA_FILES]


def load_metadata_folder(folder: str, label_column: str | None = None, cache_dir: str | None = None) -> Dataset:
    """
    Reads a folder in the `imagefolder` format of `datasets`: images, and files that list them in a column `file_name`.

    Images that no row lists are told in a warning.

    Args:
        folder (`str`):
            A folder for which [`metadata_files`] finds files. Their paths are relative to the folder they lie in.
        label_column (`str`, *optional*):
            The column of the labels, which must not be that of the paths.
        cache_dir (`str`, *optional*):
            The cache folder of `datasets`.

    Returns:
        `datasets.Dataset`: The columns of the files, and the column `image`.

    Raises:
        ValueError: If a file cannot be read, has no column `file_name`, or lists an image that does not exist.
    """
    images, others = list_images(folder)
    tables = []
    for file in metadata_among(others):
        builder, settings = METADATA_FILES[os.path.basename(file)]
        table = _read_table(builder, file, label_column, cache_dir, settings)
        tables.append(_with_images(table, file, "file_name", None, label_column))
    dataset = _joined(tables, repr(folder), IMAGE)
    listed = set(_paths(dataset, IMAGE))
    left_out = [path for path in images if os.path.normpath(path) not in listed]
    if left_out:
        logger.warning(
            "%d images in %r are left out, such as %r: no metadata file lists them.",
            len(left_out),
            folder,
            left_out[0],
        )
    return dataset


def split_by_folder(dataset: Dataset, folders: Mapping[str, str]) -> DatasetDict:
    """Returns splits of the images of a dataset, by the folder of each split that they are in.

    Raises:
        ValueError: If an image is in none of the folders.
    """
    roots = {split: os.path.join(os.path.normpath(folder), "") for split, folder in folders.items()}
    rows: dict[str, list[int]] = {split: [] for split in roots}
    for row, path in enumerate(_paths(dataset, IMAGE)):
        split = next((split for split, root in roots.items() if path.startswith(root)), None)
        if split is None:
            raise ValueError(f"The image {path!r} is in none of the folders of splits, {', '.join(roots.values())}.")
        rows[split].append(row)
    return DatasetDict({split: dataset.select(of_split) for split, of_split in rows.items() if of_split})


def holds_paths(file: str, image_column: str | None = None) -> bool:
    """Returns whether a file is a table with a column of paths to images, and not one of images."""
    extension = os.path.splitext(file)[1].lower()
    if extension in TABLES:
        return True
    features = read_files(ROWS[extension][0], [file], streaming=True).features or {}  # reads no rows
    if image_column is not None:
        return is_text(features.get(image_column))
    has_images = any(is_image(feature) or is_bytes(feature) for feature in features.values())
    return not has_images and any(is_text(features.get(name)) for name in PATH_COLUMNS)


def load_path_tables(
    files: Sequence[str],
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """
    Reads csv, tsv, jsonl, parquet or arrow files with a column of paths to images.

    Args:
        files (`Sequence[str]`):
            Files of one format.
        image_column (`str`, *optional*):
            The column of the paths. By default the first of `PATH_COLUMNS` that the file has.
        label_column (`str`, *optional*):
            The column of the labels, which must not be that of the paths.
        cache_dir (`str`, *optional*):
            The cache folder of `datasets`.

    Returns:
        `datasets.Dataset`: The columns of the files, with the images in `image_column`, or by default in `image`.

    Raises:
        ValueError: If a file cannot be read, has no such column, or lists an image that does not exist.
    """
    tables = []
    for file in files:
        builder, settings = {**TABLES, **ROWS}[os.path.splitext(file)[1].lower()]
        table = _read_table(builder, file, label_column, cache_dir, settings)
        usual = [name for name in PATH_COLUMNS if name in table.features]
        column = image_column or next(iter(usual), PATH_COLUMNS[0])
        tables.append(_with_images(table, file, column, image_column, label_column))
    return _joined(tables, ", ".join(map(repr, files)), image_column or IMAGE)


def _read_table(builder: str, file: str, label_column: str | None, cache_dir: str | None, settings: dict) -> Dataset:
    """Reads one table, in which no class name or path has more than one line."""
    if builder == "json":
        check_is_utf_8(file)
    table = read_csv(file, settings) if builder == "csv" else read_files(builder, [file], cache_dir=cache_dir)
    _check_line_breaks(table, file, {label_column, *USUAL_LABEL_NAMES, *PATH_COLUMNS})
    return table


def _check_line_breaks(table: Dataset, file: str, columns: set[str | None]) -> None:
    """Checks that no class name or path has more than one line. A quote without its end swallows the next rows."""
    for column, feature in table.features.items():
        if not is_text(feature):
            continue
        texts = table.data.column(column).cast(pa.large_string())  # Arrow cannot search in string_view
        broken = pc.indices_nonzero(pc.fill_null(pc.match_substring_regex(texts, "[\r\n]"), False)).to_pylist()
        if not broken or bytes_of_text(texts[broken[0]].as_py()) is not None:  # base64 in lines
            continue
        found = (
            f"{len(broken)} of {len(table)} rows of {file!r} have a line break in the column {column!r}, such as row "
            f"{broken[0]}: {texts[broken[0]].as_py()[:100]!r}."
        )
        if column in columns:
            raise ValueError(
                f"{found} Often a double quote without a second one has swallowed the next rows. Double the quotes "
                "that belong to a class name or a path and put all of it in quotes, or remove the line breaks."
            )
        logger.warning("%s If that is a double quote without a second one, rows are lost.", found)


def _with_images(
    table: Dataset, file: str, column: str, image_column: str | None, label_column: str | None
) -> Dataset:
    """Returns a table of paths, relative to the folder of its file, with the images in `image_column`."""
    types = ", ".join(f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in table.features.items())
    if column not in table.features or not is_text(table.features[column]):
        raise ValueError(
            f"{file!r} needs a column {column!r} of paths to images, relative to its folder, and one of class names. "
            f"Its columns are: {types}. Rename the column, or name it with image_column; the first line of a csv file "
            "must name the columns."
        )
    other_labels = [name for name in USUAL_LABEL_NAMES if name in table.features and name != column]
    if column == label_column or (label_column is None and column in USUAL_LABEL_NAMES and not other_labels):
        raise ValueError(
            f"The column {column!r} cannot be the image column and the label column; name another. In {file!r} it is "
            "taken for the paths of the images."
        )
    names = table[column][:]
    empty = [row for row, name in enumerate(names) if not name]
    if empty:
        raise ValueError(f"{len(empty)} rows of {file!r} have no path in {column!r}, such as row {empty[0]}.")
    name = image_column or IMAGE
    kept = table.remove_columns([old for old in {column, name} if old in table.features])
    if not kept.features:
        raise ValueError(f"{file!r} has no column of class names. Its columns are: {types}.")
    if len(names) and bytes_of_text(names[0]) is not None:
        return kept.add_column(name, _contents(names, file, column)).cast_column(name, Image())
    paths = find_beside(names, file)
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images that {file!r} lists in {column!r} do not exist, such as "
            f"{shown(missing[0])}. Correct the paths, which are relative to the folder of the file, or remove the "
            f"rows.{hint_at(missing[0], file)}"
        )
    # The time of the last change becomes a part of the fingerprint, so that changed images are embedded again.
    times = [0 if is_remote(path) else os.stat(path).st_mtime_ns for path in paths]
    dated = kept.add_column(name, times).remove_columns(name)
    return dated.add_column(name, paths).cast_column(name, Image())


def _contents(names: Sequence[str], file: str, column: str) -> list[bytes]:
    """Returns the images that texts hold, in base64 or as data URIs."""
    contents = [bytes_of_text(name) for name in names]
    others = [row for row, content in enumerate(contents) if content is None]
    if others:
        raise ValueError(
            f"{file!r} holds images as texts (base64) in {column!r}, but {len(others)} of {len(names)} rows are no "
            f"images, such as row {others[0]}: {shown(names[others[0]])}. Write them again, or remove the rows."
        )
    return contents


def _paths(dataset: Dataset, column: str) -> list[str | None]:
    files = dataset.select_columns(column).with_format("arrow")[:][column]
    paths = pc.struct_field(files, "path").to_pylist()
    return [path if path is None or is_remote(path) else os.path.normpath(path) for path in paths]


def _joined(tables: list[Dataset], source: str, column: str) -> Dataset:
    if any(table.features != tables[0].features for table in tables):
        raise ValueError(f"The tables of {source} have different columns or types; make them equal.")
    dataset = concatenate_datasets(tables)
    counts = Counter(_paths(dataset, column))
    repeated = [path for path, count in counts.items() if count > 1 and path is not None]
    if repeated:
        logger.warning("%s lists %d images more than once, such as %r.", source, len(repeated), repeated[0])
    return dataset


def read_files(builder: str, files: Sequence[str], split: str = "train", **settings) -> Dataset | IterableDataset:
    """Reads files with a builder of `datasets`. Those that it cannot read are named in a `ValueError`."""
    data_files = {split: [glob.escape(file) for file in files]}
    try:
        return load_dataset(builder, data_files=data_files, split=split, **settings)
    except OSError:  # no access, or no space in the cache
        raise
    except Exception as error:  # each format has errors of its own
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise unreadable(files, builder, reason or error) from error
