"""Lists of paths that say which images of a folder are for the test."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter

from datasets import Dataset, Image

from .columns import IMAGE, LABEL, class_names_of
from .text_tables import encoding_of


logger = logging.getLogger(__name__)

FORMAT = "Expected one path per line, relative to the folder, such as cat/1.jpg, and nothing else."
NUM_SHOWN = 5


def split_by_list(
    dataset: Dataset, folder: str | os.PathLike, list_file: str | os.PathLike
) -> tuple[Dataset, Dataset]:
    """
    Splits the images of a folder into those that a text file lists, for the test, and all others, for training.

    Args:
        dataset (`datasets.Dataset`):
            The images of the folder, as [`load_image_dataset`] reads them from `folders`.
        folder (`str` or `os.PathLike`):
            The folder that the paths in the list are relative to.
        list_file (`str` or `os.PathLike`):
            A text file with the path of one image per line. The ending may be left out, as in the lists of Food-101,
            where no other image has the same name.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The training images and the test images.

    Raises:
        ValueError: If the file cannot be read, if a path is no image of the folder or is listed twice, or if a class
            is left without training images.

    Example:

    ```py
    >>> images = load_image_dataset(folders={"train": "pets"})["train"]
    >>> train, test = split_by_list(images, "pets", "pets/test.txt")
    ```
    """
    folder, list_file = (os.path.expanduser(os.fspath(path)) for path in (folder, list_file))
    entries = _read_list(list_file)
    rows = _rows_by_path(dataset, folder)
    found = {entry: _find(entry, folder, rows) for entry in entries}
    _check_found([entry for entry, row in found.items() if row is None], len(entries), folder, list_file, rows)
    times = Counter(found[entry] for entry in entries)
    twice = [entry for entry in found if times[found[entry]] > 1]
    if twice:
        raise ValueError(f"{list_file!r} lists images more than once: {_shown(twice)}. Remove the repetitions.")
    is_test = set(times)
    train = dataset.select([row for row in range(len(dataset)) if row not in is_test])
    test = dataset.select(sorted(is_test))
    _check_classes(train, test, list_file)
    return train, test


def _read_list(list_file: str) -> list[str]:
    if not os.path.isfile(list_file):
        raise ValueError(f"The list {list_file!r} does not exist, or is no file.")
    with open(list_file, encoding=encoding_of(list_file)) as file:
        entries = [entry for line in file if (entry := line.strip())]
    if not entries:
        raise ValueError(f"{list_file!r} is empty. {FORMAT}")
    return entries


def _key(path: str) -> str:
    """Returns a path in the form in which paths are compared, whatever system wrote it."""
    return unicodedata.normalize("NFC", os.path.normpath(path).replace(os.sep, "/"))


def _rows_by_path(dataset: Dataset, folder: str) -> dict[str, list[int]]:
    """Returns the rows of each path relative to the folder and, for paths without an ending, of all that begin so."""
    exact: dict[str, list[int]] = {}
    without_ending: dict[str, list[int]] = {}
    for row, image in enumerate(dataset.cast_column(IMAGE, Image(decode=False))[IMAGE]):
        if not image["path"] or image["bytes"] is not None:
            raise ValueError(
                f"The images of {folder!r} are not read from files of their own, so a list of paths cannot split "
                "them. Give a folder with one sub-folder of image files for each class."
            )
        key = _key(os.path.relpath(image["path"], folder))
        exact[key] = [row]
        without_ending.setdefault(os.path.splitext(key)[0], []).append(row)
    return without_ending | exact


def _find(entry: str, folder: str, rows: dict[str, list[int]]) -> int | None:
    """Returns the row of the image that an entry of the list means, or `None`."""
    path = os.path.relpath(entry, os.path.abspath(folder)) if os.path.isabs(entry) else entry
    for form in (path, path.replace("\\", "/")):
        if len(found := rows.get(_key(form), [])) == 1:
            return found[0]
    return None


def _check_found(missing: list[str], number: int, folder: str, list_file: str, rows: dict[str, list[int]]) -> None:
    """Raises `ValueError` if entries are no images, and says what may be wrong with them."""
    if not missing:
        return
    first = missing[0]
    inner = _key(first).partition("/")[2]
    if len(rows.get(_key(first), [])) > 1:
        hint = "Several images have this name; add the ending."
    elif inner in rows:
        hint = f"Write {inner!r}: paths are relative to {folder!r}."
    elif os.path.isfile(os.path.join(folder, first)):
        hint = "The file exists, but is not among the images that were read."
    else:
        hint = FORMAT
    raise ValueError(
        f"{len(missing)} of {number} lines of {list_file!r} are no images in {folder!r}: {_shown(missing)}. {hint}"
    )


def _check_classes(train: Dataset, test: Dataset, list_file: str) -> None:
    """Raises `ValueError` if a class has no training images, and warns of those without test images."""
    names = class_names_of(train)
    without = {
        split: [names[label] for label in sorted(set(range(len(names))) - set(dataset[LABEL][:]))]
        for split, dataset in (("train", train), ("test", test))
    }
    if without["train"]:
        raise ValueError(
            f"{list_file!r} leaves {len(without['train'])} of {len(names)} classes without training images: "
            f"{_shown(without['train'])}. Leave some of their images out of the list."
        )
    if without["test"]:
        number = f"{len(without['test'])} of {len(names)} classes"
        logger.warning("%r lists no test images of %s: %s.", list_file, number, _shown(without["test"]))


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:NUM_SHOWN])) + (", ..." if len(names) > NUM_SHOWN else "")
