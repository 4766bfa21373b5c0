"""Reading the images of a dataset: from their files, or as the dataset's own transform gives them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from ..file_contents import shown
from ..image_files import UnreadableImageError, bytes_of_text, decode_image
from .columns import IMAGE, LABEL, type_name


# Reads images (B,), given the values of the column `image` and the labels, which it returns, too.
Reader = Callable[[Sequence, Sequence | None], tuple[list[Image.Image], Sequence | None]]


def readable(
    dataset: Dataset | IterableDataset, others: Sequence[str] = (LABEL,)
) -> tuple[Dataset | IterableDataset, Reader]:
    """
    Returns the columns `image` and `label` of a dataset, in a form that is not decoded, and what reads the images.

    A transform of the dataset, which was given to its `with_transform` or `set_transform`, is respected: what it
    returns under `image` is the image, and what it returns under `label`, if anything, is the label. All other
    formats, such as `with_format("torch")`, and their choice of columns do not matter.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A dataset with the columns `image` and `label`.
        others (`Sequence[str]`, *optional*):
            The columns beside `image`, in place of `label`.

    Raises:
        TypeError: If the column is not of the type `Image`, which a transform may have instead.
        ValueError: If there is no column `label`, or the mode of the images is unknown.
        UnreadableImageError: If rows hold no image.
    """
    if transform_of(dataset) is None:
        mode = getattr((dataset.features or {}).get(IMAGE), "mode", None)
        return undecoded(dataset.select_columns([IMAGE, *others])), ImageReader(mode)
    rows = Dataset.from_dict({IMAGE: np.arange(len(dataset))})
    if others:
        rows = without_format(dataset).select_columns(list(others)).add_column(IMAGE, rows[IMAGE][:])
    return rows, TransformReader(dataset)


def transform_of(dataset: Dataset | IterableDataset) -> Callable | None:
    """Returns the function that was given to `with_transform` or `set_transform`, if there is one."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] != "custom":
        return None
    return dataset.format["format_kwargs"]["transform"]


def name_of(transform: Callable) -> str:
    """Returns the name of a transform for messages."""
    return getattr(transform, "__qualname__", type(transform).__qualname__)


def without_format(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Returns the dataset with all its columns, as Python objects."""
    form = dataset.format if isinstance(dataset, Dataset) else None
    if form and form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return dataset  # with the same fingerprint
    return dataset.with_format(None)


class ImageReader:
    """Reads images from their files or bytes.

    Args:
        mode (`str`, *optional*):
            The mode of Pillow that the images are converted to before they become RGB: that of the column's type, such
            as `Image(mode="L")`.
    """

    def __init__(self, mode: str | None = None) -> None:
        self.mode = None if mode == "RGB" else mode
        if self.mode is not None:
            try:
                self._in_mode(Image.new("RGB", (1, 1)))
            except (ValueError, KeyError, OSError) as error:
                raise ValueError(
                    f"The column {IMAGE!r} has the type Image(mode={mode!r}), but Pillow cannot convert RGB to this "
                    f"mode and back ({error}). Choose 'RGB' or 'L', or no mode: "
                    f"dataset.cast_column({IMAGE!r}, datasets.Image())."
                ) from error

    def __call__(self, images: Sequence, labels: Sequence | None) -> tuple[list[Image.Image], Sequence | None]:
        return [self._in_mode(decode(image)) for image in images], labels

    def _in_mode(self, image: Image.Image) -> Image.Image:
        return image if self.mode is None else image.convert(self.mode).convert("RGB")


class TransformReader:
    """Reads images as the transform of a dataset gives them. In place of the images it gets the numbers of the rows.

    Args:
        dataset (`datasets.Dataset`):
            A dataset with a transform.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __call__(self, rows: Sequence[int], labels: Sequence | None) -> tuple[list[Image.Image], Sequence | None]:
        rows = list(rows)
        try:
            batch = self.dataset[rows]
        except Exception:
            self._check_files(rows)  # `datasets` opens them before the transform is called, and names none
            raise
        name = name_of(transform_of(self.dataset))
        if not isinstance(batch, Mapping) or IMAGE not in batch:
            returned = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"The transform {name} of the dataset returns {returned}, but no {IMAGE!r}. Return a dictionary with "
                f"the images under {IMAGE!r}, so that they can be processed. If it makes pixel_values itself, give "
                "the dataset to the Trainer as it is; to leave the transform out, use dataset.with_format(None)."
            )
        images = batch[IMAGE]
        if not isinstance(images, Sized) or isinstance(images, str) or len(images) != len(rows):
            number = f"{len(images)} images" if isinstance(images, Sized) else f"a {type(images).__name__}"
            raise ValueError(
                f"The transform {name} of the dataset returns {number} for {len(rows)} rows. It gets the lists of a "
                "batch, and must return a list with one image for each row."
            )
        return [decode(image) for image in images], batch.get(LABEL, labels)

    def _check_files(self, rows: list[int]) -> None:
        if isinstance(self.dataset.features.get(IMAGE), ImageFeature):
            for image in undecoded(self.dataset.select_columns([IMAGE]))[rows][IMAGE]:
                decode(image)


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Returns the dataset without a format and with its images as path and bytes, for [`decode`].

    Raises:
        TypeError: If the column is not of the type `Image`.
        UnreadableImageError: If rows hold no image.
    """
    feature = (dataset.features or {}).get(IMAGE)
    if feature is not None and not isinstance(feature, ImageFeature):
        raise TypeError(
            f"The column {IMAGE!r} holds {type_name(feature)}, but must have the type Image of datasets. If it holds "
            f"paths or the bytes of files: dataset.cast_column({IMAGE!r}, datasets.Image())."
        )
    dataset = without_format(dataset)
    check_rows(dataset)
    return dataset.cast_column(IMAGE, ImageFeature(mode=getattr(feature, "mode", None), decode=False))


def check_rows(dataset: Dataset | IterableDataset) -> None:
    """Raises an `UnreadableImageError` if rows hold no image: neither bytes nor a path. Images are not read."""
    if isinstance(dataset, IterableDataset):  # told by `decode`, when such a row comes
        return
    if not paths_without_content(dataset).null_count:
        return
    rows = without_format(dataset.select_columns(IMAGE)).cast_column(IMAGE, ImageFeature(decode=False))
    empty = [str(number) for number, row in enumerate(rows) if _is_empty(row[IMAGE])]
    if empty:
        split = f" of the split {str(dataset.split)!r}" if dataset.split else ""
        raise UnreadableImageError(
            f"{len(empty)} of {len(dataset)} rows{split} hold no image, neither bytes nor a path; counted from 0: "
            f"{', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}. Remove these rows, or add their images."
        )


def paths_without_content(dataset: Dataset) -> pa.ChunkedArray:
    """Returns the path, or null, of each image without bytes: of all rows, also of those that were not selected."""
    images = dataset.data.column(IMAGE)
    length = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0)
    return pc.struct_field(images, "path").filter(pc.equal(length, 0))


def _is_empty(image: dict | None) -> bool:
    return not image or not (image.get("bytes") or image.get("path"))


def content_of(image: dict) -> bytes | str:
    """Returns the bytes of a row of an image column, or the path of its file on this machine.

    The path may be an address, a data URI, or the image itself in base64.

    Raises:
        UnreadableImageError: If the row is empty, or its address cannot be fetched.
    """
    if _is_empty(image):
        raise UnreadableImageError("A row holds no image, neither bytes nor a path. Remove it, or add its image.")
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return content
    if "://" not in path:
        embedded = None if os.path.exists(path) else bytes_of_text(path)
        return path if embedded is None else embedded
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # each file system has its own
        raise UnreadableImageError(
            f"Cannot read {shown(path)}: it cannot be fetched ({type(error).__name__}: {error}). Download it first."
        ) from error


def decode(image) -> Image.Image:
    """
    Decodes a row of an image column with [`decode_image`], from its `bytes` or from a `path` that may be remote.

    Some operations on a stream, such as its `filter`, have opened the image already, and transforms may return images,
    arrays or tensors.

    Raises:
        UnreadableImageError: If that fails. The message names the file.
    """
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if isinstance(image, (Image.Image, np.ndarray, str, bytes)):
        return decode_image(image)
    if image is not None and not isinstance(image, dict):
        raise UnreadableImageError(
            f"Cannot read an object of type {type(image).__name__}: expected an image of Pillow, an array, a tensor, "
            "or a path."
        )
    content = content_of(image)
    path = image.get("path")
    return decode_image(content, name=shown(path) if path else None)
