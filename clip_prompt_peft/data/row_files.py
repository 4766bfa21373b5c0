"""Files that `datasets` finds in a folder, and labels of parquet and arrow files, which must mean the same in each.

`datasets` takes the types of the columns, and with them the class names, from the first file, and gives them to the
numbers of all others. Of files that are not on this machine, only the heads are read, which hold the types.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import BinaryIO

import datasets.config
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetBuilder, Features, IterableDataset, load_dataset_builder
from huggingface_hub import HfFileSystem

from .columns import TEXTS, USUAL_LABEL_NAMES, is_text
from .path_tables import ROWS, TABLES


logger = logging.getLogger(__name__)

MAX_REMOTE_FILES = 500  # whose heads are read, at one or two requests each
NUM_THREADS = 16  # that wait for answers
BLOCK_SIZE = 2**16  # bytes that are asked for at once
CHUNK = 10_000  # rows of a csv file whose types `datasets` guesses together
FOUND_BY_DATASETS = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
# The settings of `load_dataset` that `load_dataset_builder` does not have.
LOADING_ONLY = {"split", "streaming", "num_proc", "save_infos", "verification_mode", "keep_in_memory"}
ADVICE = (
    "`datasets` would give all of them the class names of the first. Write the files again with the same names in the "
    "same order, for example after dataset.align_labels_with_mapping(label2id, {column!r}), or with names as text; of "
    "a repository that is not yours, load a part with data_files."
)


def check_same_labels(files: Sequence[str], label_column: str | None = None) -> None:
    """
    Checks that the labels of parquet or arrow files mean the same. Reads no rows.

    Args:
        files (`Sequence[str]`):
            Files that are loaded together. A file that cannot be read is left to `datasets`, which says why.
        label_column (`str`, *optional*):
            The column of the labels. By default, the columns with a usual name and those that are a `ClassLabel`.

    Raises:
        ValueError: If two files have other class names or another order of them, or names in one and numbers or text
            in the other. It names both files.
    """
    _check_schemas({file: schema for file in files if (schema := _read_schema(file)) is not None}, label_column)


def _check_schemas(schemas: dict[str, pa.Schema], label_column: str | None) -> None:
    class_names = {file: _class_names(schema) for file, schema in schemas.items()}
    with_names = {column for of_file in class_names.values() for column in of_file}
    columns = [label_column] if label_column is not None else sorted({*USUAL_LABEL_NAMES, *with_names})
    for column in columns:
        having = [file for file, schema in schemas.items() if _has_values(schema, column)]
        first = having[0] if having else ""
        for other in having[1:]:
            kinds = [_kind(schemas[file].field(column).type, class_names[file].get(column)) for file in (first, other)]
            if kinds[0] != kinds[1] and kinds != ["class names", "text"]:  # text is put in its place by its name
                raise ValueError(
                    f"The column {column!r} holds {kinds[0]} in {first!r}, but {kinds[1]} in {other!r}. "
                    + ADVICE.format(column=column)
                )
            _check_same_names(column, first, class_names[first].get(column), other, class_names[other].get(column))


def find_builder(name: str, config: str | None, settings: dict) -> DatasetBuilder | None:
    """Returns the builder of `datasets` that reads a data set, with the settings of `load_dataset`.

    It is `None` if the data set is not there or gives no answer, which `load_dataset` then says.
    """
    settings = {key: value for key, value in settings.items() if key not in LOADING_ONLY}
    try:
        return load_dataset_builder(name, config, **settings)
    except OSError:
        return None


def tables_of(builder: DatasetBuilder) -> dict[str, list[str]] | None:
    """Returns the files of each split if all are csv, tsv or jsonl files without settings of their own.

    `datasets` guesses the types of a csv file for each 10,000 rows, and looks for images in the working directory.
    """
    files = {str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    endings = {os.path.splitext(file)[1].lower() for found in files.values() for file in found}
    is_local = all(os.path.isfile(file) for found in files.values() for file in found)
    if len(endings) != 1 or not endings <= {*TABLES} or not is_local:
        return None
    usual = {field.name: getattr(type(builder.config)(), field.name) for field in fields(builder.config)}
    own = [name for name, value in usual.items() if getattr(builder.config, name) != value]
    return None if set(own) - FOUND_BY_DATASETS else files


def warn_of_guessed_types(splits: Mapping[str, Dataset | IterableDataset], label_column: str | None) -> None:
    """Warns of class names like numbers in a long csv file that `datasets` has read: `007` may have become `7`."""
    for split in splits.values():
        if isinstance(split, IterableDataset) or split.info.builder_name != "csv" or len(split) <= CHUNK:
            continue
        for column in [label_column] if label_column is not None else USUAL_LABEL_NAMES:
            if not is_text(split.features.get(column)):
                continue
            names = split.select_columns(column).with_format("arrow")[:][column].unique().to_pylist()
            numbers = [name for name in names if name and re.fullmatch(r"[+-]?[\d.]+", name)]
            if numbers:
                logger.warning(
                    "`datasets` has guessed the types of %r for each 10,000 rows of a csv file, so class names such "
                    "as %r may have lost zeros in some of them. Download the file and give it as files=..., or as "
                    "parquet.",
                    column,
                    numbers[0],
                )
                return


def check_labels_of_builder(builder: DatasetBuilder, label_column: str | None, settings: dict) -> None:
    """Checks the parquet and arrow files of all splits that a builder has found, on the Hub or elsewhere.

    Args:
        builder (`datasets.DatasetBuilder`):
            What reads the data set, see [`find_builder`].
        label_column (`str`, *optional*):
            The column of the labels.
        settings (`dict`):
            The other arguments of `load_dataset`.

    Raises:
        ValueError: As [`check_same_labels`], or if the card or `features` name the classes of a file in another order.
    """
    found = [str(file) for of_split in (builder.config.data_files or {}).values() for file in of_split]
    files = [file for file in dict.fromkeys(found) if _ending(file) in ROWS]
    schemas = _read_schemas(files, {**(settings.get("storage_options") or {}), "token": settings.get("token")})
    _check_schemas(schemas, label_column)
    for column, feature in (builder.info.features or {}).items() if schemas else ():
        first = next(iter(schemas))
        names = _class_names(schemas[first]).get(column)
        if names and isinstance(feature, ClassLabel) and set(names) == set(feature.names):
            _check_same_names(column, first, names, "its dataset card or `features`", feature.names)


def _ending(file: str) -> str:
    return os.path.splitext(file.partition("?")[0] if "://" in file else file)[1].lower()


def _read_schemas(files: Sequence[str], options: dict) -> dict[str, pa.Schema]:
    """Reads the columns of files on this machine or elsewhere; leaves out those that cannot be read."""
    remote = [file for file in files if "://" in file]
    if len(remote) > MAX_REMOTE_FILES:
        logger.warning(
            "The class names of the first %d of %d files are compared, since each takes a request.",
            MAX_REMOTE_FILES,
            len(remote),
        )
    schemas = {file: _read_schema(file) for file in files if os.path.isfile(file)}
    systems = {file: _file_system(file, options) for file in remote[:MAX_REMOTE_FILES]}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        schemas.update(zip(systems, pool.map(lambda file: _read_remote_schema(file, systems[file]), systems)))
    return {file: schemas[file] for file in files if schemas.get(file) is not None}


def _file_system(file: str, options: dict) -> fsspec.AbstractFileSystem | None:
    """Returns what reads a remote file, with the user's token for the Hub, or `None` if it is not installed."""
    protocol = file.partition("://")[0]
    try:
        if protocol == "hf":  # the same object as `datasets` has, which knows the list of files already
            return HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, token=options["token"])
        return fsspec.filesystem(protocol, **options.get(protocol, {}))
    except (ImportError, OSError, TypeError, ValueError):
        return None


def _read_remote_schema(file: str, system: fsspec.AbstractFileSystem | None) -> pa.Schema | None:
    try:
        with system.open(file, "rb", block_size=BLOCK_SIZE) as opened:
            return _schema_of(opened, file)
    except Exception:  # of any HTTP library, or no such file; `datasets` reads it next, and says why it cannot
        return None


def _read_schema(file: str) -> pa.Schema | None:
    """Returns the columns that the head of a file names, or `None` if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return _schema_of(opened, file)
    except (OSError, pa.ArrowException):
        return None


def _schema_of(opened: BinaryIO, file: str) -> pa.Schema:
    if _ending(file) == ".parquet":
        return pq.read_schema(opened)
    try:
        with pa.ipc.open_stream(opened) as stream:
            return stream.schema
    except pa.ArrowInvalid:
        opened.seek(0)
        with pa.ipc.open_file(opened) as table:
            return table.schema


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Returns the class names of the columns that `datasets` wrote as a `ClassLabel`."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    types = ((json.loads(metadata).get("info") or {}).get("features") if metadata else None) or {}
    features = Features.from_dict(types)
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _has_values(schema: pa.Schema, column: str) -> bool:
    return schema.get_field_index(column) >= 0 and not pa.types.is_null(schema.field(column).type)


def _kind(arrow_type: pa.DataType, names: list[str] | None) -> str:
    if names is not None:
        return "class names"
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return "text" if str(arrow_type) in TEXTS else "values without names"


def _check_same_names(
    column: str, first: str, names: list[str] | None, other: str, other_names: list[str] | None
) -> None:
    if names is None or other_names is None or names == other_names:
        return
    pairs = enumerate(zip(names, other_names))
    at = next((label for label, (name, of_other) in pairs if name != of_other), min(len(names), len(other_names)))
    shown = [", ".join(map(repr, some[max(at - 2, 0) : at + 5])) for some in (names, other_names)]
    raise ValueError(
        f"The classes of the column {column!r} differ from label {at} on: {first!r} has {len(names)}, {shown[0]}; "
        f"{other!r} has {len(other_names)}, {shown[1]}. {ADVICE.format(column=column)}"
    )
