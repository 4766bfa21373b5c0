"""Where the images are that a table lists: beside the table, or in the working directory, however they are spelled.

A relative path is relative to the folder of its table. Only if there is no such file, and one in the working
directory, that one is taken, with a warning.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from ..file_contents import MAX_NAME, shown
from ..image_files import image_endings


logger = logging.getLogger(__name__)

FILE = "file://"


def is_remote(path: str) -> bool:
    """Returns whether a path is an address, such as `https://...`."""
    return "://" in path


def find_beside(names: Sequence[str], file: str) -> list[str]:
    """Returns the paths of images that a table lists: those in the folder of the table go first."""
    folder, paths = os.path.dirname(file), []
    elsewhere, respelled = [], []
    for name in names:
        path = _beside(name.removeprefix(FILE), folder)
        if not is_remote(path) and not os.path.exists(path):
            spelled = next((form for form in _spellings(name) if os.path.exists(_beside(form, folder))), None)
            here = None if spelled is not None else next(filter(os.path.exists, _spellings(name)), None)
            if here is not None:
                elsewhere.append(here)
                path = os.path.abspath(here)
            elif spelled is not None:
                path = _beside(spelled, folder)
            if (found := here or spelled) and found != name.removeprefix(FILE):
                respelled.append((name, found))
        paths.append(path)
    if elsewhere:
        logger.warning(
            "%d of the %d images that %r lists are not in its folder but in the working directory, such as %r.",
            len(elsewhere),
            len(names),
            file,
            elsewhere[0],
        )
    if respelled:
        logger.warning(
            "%d of the %d paths that %r lists are read in another spelling, since there is no such file, such as %a "
            "as %a.",
            len(respelled),
            len(names),
            file,
            *respelled[0],
        )
    return paths


def _beside(name: str, folder: str) -> str:
    return name if is_remote(name) else os.path.join(folder, os.path.expanduser(name))


def _spellings(name: str) -> Iterator[str]:
    """Yields a path as it is, and as it is called elsewhere: on Windows, on a Mac, in an address, among spaces."""
    plain = name.removeprefix(FILE)
    yield plain
    for form in (plain, plain.strip(), unquote(plain) if name.startswith(FILE) else plain):
        for slashed in (form, form.replace("\\", "/")):
            yield from (unicodedata.normalize(kind, slashed) for kind in ("NFC", "NFD"))


def hint_at(path: str, file: str) -> str:
    """Returns what to do with a path that does not exist, after a space: a file of nearly the same name, if any."""
    if len(path) > MAX_NAME:
        return " A text this long is no path; images as texts must be in base64, or data URIs."
    name = re.split(r"[\\/]", path)[-1].casefold()
    for folder in dict.fromkeys((os.path.dirname(path), os.path.dirname(file))):
        entries = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
        for entry in entries:
            stem, ending = os.path.splitext(entry)
            if ending.lower() in image_endings() and name in (entry.casefold(), stem.casefold()):
                return f" There is {shown(os.path.join(folder, entry))}; perhaps that is meant."
    return ""


def with_found_paths(table: Dataset, file: str, column: str) -> Dataset:
    """Returns a table of images in which those without bytes have paths that are found, see [`find_beside`]."""
    images = table.data.column(column)
    if not pa.types.is_struct(images.type) or {"bytes", "path"} - {field.name for field in images.type}:
        return table
    only_paths = pc.and_(pc.is_null(pc.struct_field(images, "bytes")), pc.is_valid(pc.struct_field(images, "path")))
    if not pc.any(only_paths).as_py():
        return table
    records = Features({column: {"bytes": Value("binary"), "path": Value("string")}})
    rows = images.combine_chunks().to_pylist()
    listed = [row for row in rows if row and row["bytes"] is None and row["path"] is not None]
    for row, path in zip(listed, find_beside([row["path"] for row in listed], file)):
        row["path"] = path
    kept = [row and {"bytes": row["bytes"], "path": row["path"]} for row in rows]
    feature = table.features[column]
    found = Dataset.from_dict({column: kept}, features=records)
    found = found.cast_column(column, feature if isinstance(feature, Image) else Image())
    return concatenate_datasets([table.remove_columns(column), found], axis=1) if table.num_columns > 1 else found
