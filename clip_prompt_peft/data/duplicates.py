"""Images that are in two splits, which makes a test say too much."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..image_files import UnreadableImageError
from .columns import IMAGE, check_is_no_stream
from .reading import content_of, decode, undecoded


MAX_DECODED = 2**24  # bytes of files: so few are compared by their pixels
MAX_READ = 2**31  # bytes of files: so many are compared byte for byte
COST_OF_OPENING = 2**14  # bytes that could be read meanwhile
BATCH = 1000


@dataclass
class SharedImages:
    """
    The images that two data sets have in common.

    Attributes:
        rows (`list[tuple[int, int]]`): The row of an image of the second data set and that of its equal in the first.
        names (`list[tuple[str, str]]`): What they are called: their paths, or `"row 3"`.
        num_skipped (`int`): The number of images of both that were not compared.
    """

    rows: list[tuple[int, int]]
    names: list[tuple[str, str]]
    num_skipped: int


def shared_images(
    first: Dataset, second: Dataset, max_decoded: int = MAX_DECODED, max_read: int = MAX_READ
) -> SharedImages:
    """
    Finds the images of one data set that are in another one, such as test images that are trained on.

    Few images are equal if their pixels are; of more, the files are compared byte by byte. Only files of a size that
    both data sets have are read, up to `max_read` bytes of them, beginning with the smallest.

    Args:
        first, second (`datasets.Dataset`):
            Data sets with the column `image`. A transform does not count.
        max_decoded (`int`, *optional*, defaults to 16 MiB):
            The size of all files up to which pixels are compared.
        max_read (`int`, *optional*, defaults to 2 GiB):
            The size of the files that are read at most. Each counts as 16 KiB more than it has, so these are at most
            131,072 files.

    Returns:
        `SharedImages`: The rows. Images that cannot be read, and those at remote addresses, are not compared.

    Example:

    ```py
    >>> leaked = {row for row, _ in shared_images(splits["train"], splits["test"]).rows}
    >>> test = splits["test"].select([row for row in range(len(splits["test"])) if row not in leaked])
    ```
    """
    pair = [_images(dataset) for dataset in (first, second)]
    sizes = [_sizes(images, max_read) for images in pair]
    by_pixels = all((of_one >= 0).all() for of_one in sizes) and sum(int(one.sum()) for one in sizes) <= max_decoded
    compared = [of_one >= 0 for of_one in sizes]
    if not by_pixels:
        common = np.intersect1d(*[of_one[of_one >= 0] for of_one in sizes])
        read = common[_costs(common, sizes) <= max_read]
        candidates = [np.isin(of_one, read) for of_one in sizes]
        compared = [(of_one >= 0) & ~np.isin(of_one, np.setdiff1d(common, read)) for of_one in sizes]
    else:
        candidates = compared
    rows_of: dict[bytes, int] = {}
    for row, digest in _digests(pair[0], candidates[0], by_pixels):
        rows_of.setdefault(digest, row)
    found = [
        (row, rows_of[digest]) for row, digest in _digests(pair[1], candidates[1], by_pixels) if digest in rows_of
    ]
    names = [(_name(pair[1], row), _name(pair[0], other)) for row, other in found]
    return SharedImages(found, names, sum(int((~of_one).sum()) for of_one in compared))


def _images(dataset: Dataset) -> Dataset:
    check_is_no_stream(dataset)
    return undecoded(dataset.select_columns([IMAGE]))


def _sizes(images: Dataset, max_read: int) -> np.ndarray:
    """Returns the number of bytes of each image (N,), or -1 if that cannot be told cheaply."""
    # The bytes of chosen rows would be copied to measure them; those of all rows are not even read.
    if images.data.num_rows != len(images) and images.data.nbytes > max_read:
        return np.full(len(images), -1)
    sizes = [np.zeros(0, np.int64)]
    for batch in images.with_format("arrow").iter(BATCH):
        contents, paths = (pc.struct_field(_column(batch), name) for name in ("bytes", "path"))
        of_batch = pc.fill_null(pc.cast(pc.binary_length(contents), pa.int64()), -1).to_numpy(zero_copy_only=False)
        of_batch = of_batch.copy()
        for row in np.flatnonzero(of_batch < 0):
            with suppress(OSError):
                of_batch[row] = os.path.getsize(paths[int(row)].as_py())
        sizes.append(of_batch)
    return np.concatenate(sizes)


def _column(batch: pa.Table) -> pa.Array:
    return (
        batch.column(IMAGE).combine_chunks() if batch.column(IMAGE).num_chunks != 1 else batch.column(IMAGE).chunk(0)
    )


def _costs(common: np.ndarray, sizes: list[np.ndarray]) -> np.ndarray:
    """Returns how many bytes are read for all sizes up to each of the common ones, which are sorted."""
    counts = np.zeros(len(common), np.int64)
    for of_one in sizes:
        counts += np.bincount(np.searchsorted(common, of_one[np.isin(of_one, common)]), minlength=len(common))
    return np.cumsum((common + COST_OF_OPENING) * counts)


def _digests(images: Dataset, candidates: np.ndarray, by_pixels: bool) -> Iterator[tuple[int, bytes]]:
    """Yields the rows of candidates and a hash of each."""
    rows = np.flatnonzero(candidates)
    batches = images.select(rows).with_format("arrow").iter(BATCH)
    examples = (image for batch in batches for image in batch.column(IMAGE).to_pylist())
    for row, image in zip(rows.tolist(), examples):
        with suppress(OSError, UnreadableImageError):  # told when it is trained or tested on
            yield row, _digest(image, by_pixels)


def _digest(image: dict, by_pixels: bool) -> bytes:
    if by_pixels:
        decoded = decode(image)
        return hashlib.sha256(repr(decoded.size).encode() + decoded.tobytes()).digest()
    content = content_of(image)
    if isinstance(content, str):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(content).digest()


def _name(images: Dataset, row: int) -> str:
    path = images[row][IMAGE]["path"]
    return repr(path) if path else f"row {row}"
