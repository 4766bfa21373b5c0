"""Image files: which files of a folder are images, how each becomes an RGB image, and what a processor makes of it."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .file_contents import foreign_content, shown


SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}  # written by file managers
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "__pycache__"}

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF and its value for negatives

SEVERAL_IMAGES = {"AVIF", "GIF", "PNG", "TIFF", "WEBP"}  # formats; what MPO adds to a photo are views of it

MAX_16_BIT = 65535
MAX_RATIO = 16  # of the longer side to the shorter one, for processors that resize the shorter one and then crop


class UnreadableImageError(ValueError):
    """Raised if an image is missing, damaged, no image, or has values of an unknown range."""


def decode_image(image: str | os.PathLike | bytes | Image.Image | np.ndarray, name: str | None = None) -> Image.Image:
    """
    Decodes an image to RGB. Training, evaluation, export, the pipeline and all commands use this function.

    - The image is rotated as its EXIF data says.
    - The first frame of an animation and the first page of a file are taken.
    - Transparency is dropped: a transparent pixel has the color that the file stores for it.
    - 16-bit values keep their upper 8 bits, as Pillow does for 16-bit colors. Full white is 65535 in every file.
    - Files with 32-bit values do not say which value is white. It is the smallest of 1 (floating point only), 255 and
      65535 that no value exceeds. The image is refused if it has NaN or values outside of 0 to 65535, or if its
      largest value is at most a sixteenth of 255 (floating point only) or of 65535, which could be another range.
    - Arrays follow the same rules: 8-bit values are taken as they are, 16-bit values without a sign keep their upper 8
      bits, and all other numbers are treated as 32-bit values.

    Args:
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image` or `numpy.ndarray`):
            The path or the content of a file, an image that is open already, or an array of shape (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels C.
        name (`str`, *optional*):
            What to call the image in error messages. By default its path, or its number of bytes.

    Returns:
        `PIL.Image.Image`: The image in mode `"RGB"`.

    Raises:
        UnreadableImageError: If the image cannot be decoded. The message names it.

    Example:

    ```py
    >>> decode_image("scan.tif").mode
    'RGB'
    ```
    """
    name = name or _name_of(image)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name)
        if isinstance(image, np.ndarray):
            return _of_array(image, name).convert("RGB")
        if not isinstance(image, bytes) and is_special(image):  # to open a pipe would wait for what writes to it
            raise UnreadableImageError(f"Cannot read {name}: it is a pipe, a socket or a device. Name a file.")
        with Image.open(BytesIO(image) if isinstance(image, bytes) else os.fspath(image)) as opened:
            return _to_rgb(opened, name)
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        foreign = None if isinstance(image, (Image.Image, np.ndarray)) else foreign_content(image)
        reason = f"{foreign}." if foreign else _reason(error)
        raise UnreadableImageError(f"Cannot read {name}: {reason}") from error


def bytes_of_text(text: str) -> bytes | None:
    """Returns the content of an image that a text holds, as a data URI or in base64, or `None` if it is another text.

    Raises:
        UnreadableImageError: If a data URI is damaged.
    """
    if text.startswith("data:image/"):
        head, _, body = text.partition(",")
        try:
            return base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)
        except ValueError as error:
            raise UnreadableImageError(
                f"Cannot read the base64 text {shown(text)}: {error}. It may be cut off."
            ) from error
    try:
        plain = "".join(text.split()).replace("-", "+").replace("_", "/")  # as some write it for addresses
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        Image.open(BytesIO(content)).close()
    except (ValueError, UnidentifiedImageError):  # as of most paths that do not exist
        return None
    except Exception:  # an image, which `decode_image` refuses with the reason
        pass
    return content


def is_special(path: str | os.PathLike) -> bool:
    """Returns whether something exists that is neither a file nor a folder: a pipe, a socket or a device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _name_of(image) -> str:
    if isinstance(image, Image.Image):
        return repr(image.filename) if getattr(image, "filename", "") else "an image"
    if isinstance(image, np.ndarray):
        return f"an array of shape {image.shape} and type {image.dtype}"
    return f"an image of {len(image)} bytes" if isinstance(image, bytes) else repr(os.fspath(image))


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file that Pillow refuses, and what to do."""
    if isinstance(error, OSError) and error.errno is not None:  # of the file system: missing, a folder, no permission
        return f"{error.strerror}. Correct the path, or remove it."
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has too many pixels ({error}). Save it with fewer pixels, or remove it."
    if "text chunk" in str(error) or "MAX_TEXT_CHUNK" in str(error):
        return f"its metadata are too long for Pillow ({error}). Save it again without metadata, or remove it."
    details = "" if isinstance(error, UnidentifiedImageError) else f" ({error or type(error).__name__})"
    return f"it is damaged, or no image of a format that Pillow reads{details}. Replace the file, or remove it."


def _to_rgb(source: Image.Image, name: str) -> Image.Image:
    """Returns an image, with the format and tags of its file, as RGB."""
    if 0 in source.size:
        raise UnreadableImageError(f"Cannot read {name}: it has no pixels, its size is {source.size}.")
    raw_mode = _raw_mode(source)
    if source.format in SEVERAL_IMAGES and getattr(source, "is_animated", False):
        warnings.warn(
            "Some files hold several images, as animations and scans of several pages do: the first one is taken. If "
            "the others are meant, too, save each as a file of its own.",
            stacklevel=2,
        )
    image = ImageOps.exif_transpose(source)
    mode = image.mode
    if mode == "I" and source.format == "PNG":  # Pillow before 11 opens PNG files of 16 bits in this mode
        mode = "I;16"
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        if raw_mode.startswith("I;16") and "S" in raw_mode and values.max() > 255:
            warnings.warn(
                "Some images have signed 16-bit values. White is 65535, which these cannot reach, so they are at most "
                "half as bright. Save them as 8-bit images.",
                stacklevel=2,
            )
        image = Image.fromarray(_to_8_bits(values, mode, name))
        if (
            source.format == "TIFF" and source.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        ):  # Pillow does it in 8 bits only
            image = ImageOps.invert(image)
    elif ";16" in raw_mode and _is_dark(image):  # Pillow has kept the upper 8 bits of 16-bit colors
        _warn_of_dark_image()
    return image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Returns how the file of an image stores its values, such as `"RGB;16B"`, or "" if its pixels were read."""
    for *_, arguments in getattr(image, "tile", None) or []:
        first = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
        return first if isinstance(first, str) else ""
    return ""


def _is_dark(image: Image.Image) -> bool:
    """Returns whether no value of an 8-bit image, apart from its transparency, is above a sixteenth of 255."""
    bands = zip(image.getbands(), image.getextrema() if len(image.getbands()) > 1 else [image.getextrema()])
    return all(high <= 255 // 16 for band, (_, high) in bands if band != "A")


def _warn_of_dark_image() -> None:
    warnings.warn(
        "Some 16-bit images have no value above 4095, so they are nearly black (white if the values are inks): white "
        "is 65535. If these are values of 8 or 12 bits, save them as 8-bit images, or multiplied by 256 or 16.",
        stacklevel=2,
    )


def _of_array(values: np.ndarray, name: str) -> Image.Image:
    """Returns the image of an array (H, W), (H, W, C) or (C, H, W)."""
    if values.ndim == 3:
        try:
            layout = infer_channel_dimension_format(values, num_channels=(1, 3, 4))
        except ValueError:
            layout = None
        if layout == ChannelDimension.FIRST:
            values = np.moveaxis(values, 0, -1)
        values = values[..., 0] if layout and values.shape[-1] == 1 else values
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise UnreadableImageError(
            f"Cannot read {name}: expected one image of shape (H, W), (H, W, C) or (C, H, W), with 1, 3 or 4 channels "
            "C. Pass several images as a list."
        )
    if 0 in values.shape:
        raise UnreadableImageError(f"Cannot read {name}: it has no pixels.")
    if values.dtype == bool:
        values = values * np.uint8(255)
    elif values.dtype.kind not in "iuf":
        raise UnreadableImageError(f"Cannot read {name}: expected integers or floating point numbers.")
    elif values.dtype != np.uint8:
        is_float = values.dtype.kind == "f"
        mode = "F" if is_float else "I;16" if values.dtype == np.uint16 else "I"
        values = _to_8_bits(values.astype(np.float32) if is_float else values, mode, name)
    return Image.fromarray(np.ascontiguousarray(values))


def _to_8_bits(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """Scales the values (H, W) or (H, W, C) of an image of more than 8 bits to 8 bits."""
    low, high = values.min(), values.max()
    white = _white(mode, low, high)
    if white is None:
        raise UnreadableImageError(
            f"Cannot read {name}: its values range from {low} to {high} (mode {mode!r}), and the file does not say "
            f"which value is white. Expected {'0 to 1, ' if mode == 'F' else ''}0 to 255, or 0 to 65535. Scale it to "
            "one of these ranges, best to 8 bits."
        )
    if mode not in ("I", "F") and 0 < high <= white // 16:
        _warn_of_dark_image()
    if white == MAX_16_BIT:
        return (values.clip(0, white).astype(np.uint16) >> 8).astype(np.uint8)
    return (values.clip(0, white) * (255 / white)).round().astype(np.uint8)


def _white(mode: str, low: float, high: float) -> int | None:
    """Returns the value that stands for white, or `None` if that cannot be told."""
    if mode not in ("I", "F"):
        return MAX_16_BIT
    ranges = (255, MAX_16_BIT) if mode == "I" else (1, 255, MAX_16_BIT)
    rounding = 0 if mode == "I" else 1e-3  # what calculations with floating point numbers add
    for white in ranges:
        if -rounding * white <= low <= high <= (1 + rounding) * white:
            return white if white == ranges[0] or high > white // 16 else None
    return None


def process_images(image_processor, images: Sequence[Image.Image], **settings) -> BatchFeature:
    """
    Runs an image processor in bounded memory.

    A processor that resizes the shorter side of an image and crops the center makes 224 x 896000 pixels of 1 x 4000.
    Of an image that is more than 16 times as long as wide, it is therefore given the central part, from which the same
    center is cropped. All other images are processed as they are.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the model.
        images (`Sequence[PIL.Image.Image]`):
            B images from [`decode_image`].
        settings (*optional*):
            Further arguments of the processor, which replace its own settings.

    Returns:
        `BatchFeature`: `pixel_values` (B, 3, H, W) and any further outputs of the processor.
    """
    crops = getattr(image_processor, "do_center_crop", False) and "shortest_edge" in (image_processor.size or {})
    images = [_central_part(image) for image in images] if crops else list(images)
    return image_processor(images, return_tensors="pt", **settings)


def _central_part(image: Image.Image) -> Image.Image:
    """Returns the image, or the central part of one whose sides differ by more than a factor of `MAX_RATIO`."""
    limit = MAX_RATIO * min(image.size)
    # The part that is kept is odd if the side is odd, so that its center is that of the image.
    width, height = (min(side, limit + (side - limit) % 2) for side in image.size)
    if (width, height) == image.size:
        return image
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, upper, left + width, upper + height))


def image_endings() -> set[str]:
    """Returns the endings of the files that Pillow can open, in lower case and with the dot."""
    # Pillow also registers formats that it only writes; MPO, of cameras, it opens as JPEG.
    return {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN or name == "MPO"}


def list_images(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """
    Lists the files in a folder and in its sub-folders. Symbolic links are followed.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `tuple[list[str], list[str]]`: The paths of the image files and of all other files, sorted. A file is an image
        if its ending is one of [`image_endings`]. Broken links, hidden files and files in hidden folders are among the
        others; the files of file managers are left out.
    """
    folder, endings = os.fspath(folder), image_endings()
    images, others = [], []
    for path in sorted(_files_in(folder)):
        parts = os.path.relpath(path, folder).split(os.sep)
        hidden = any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)
        is_image = os.path.splitext(path)[1].lower() in endings and os.path.isfile(path)
        (images if is_image and not hidden else others).append(path)
    return images, others


def skipped_files(paths: Sequence[str]) -> str:
    """Describes files that are no images, or are hidden, with one example for each ending."""
    kinds: dict[str, list[str]] = {}
    endings = image_endings()
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            kind = "broken links"
        elif is_special(path):
            kind = "pipes, sockets or devices"
        elif (ending := os.path.splitext(path)[1].lower()) in endings:
            kind = "hidden images"
        else:
            kind = f"{ending} files" if ending else "files without an ending"
        kinds.setdefault(kind, []).append(path)
    return ", ".join(f"{len(files)} {kind} (such as {files[0]!r})" for kind, files in sorted(kinds.items()))


def _files_in(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                yield from _files_in(entry.path, (*above, real))
            elif entry.name not in SYSTEM_FILES:
                yield entry.path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
