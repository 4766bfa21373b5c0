"""What a file holds, as its first bytes show it, if that is not what its name says."""

from __future__ import annotations

import os


NUM_BYTES = 512  # that show what a file holds
MAX_NAME = 200  # characters of an address, a path or a base64 text in error messages

SAVE_AS_IMAGE = "save it as an image, such as PNG"
UNPACK = "unpack it, for example with `python -m zipfile -e FILE FOLDER` or `tar -xf FILE`"
# Where in a file it stands, what stands there (in lower case), what it is, and what to do.
CONTENTS: tuple[tuple[int, bytes, str, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS in place of the file",
        "fetch the file itself, with `git lfs install` and `git lfs pull` in its repository, or with `hf download`",
    ),
    (0, b"<!doctype html", "a web page", "download the file again; the page may say what failed"),
    (0, b"<html", "a web page", "download the file again; the page may say what failed"),
    (0, b"<svg", "an SVG drawing", SAVE_AS_IMAGE),
    (0, b"<?xml", "an XML text, such as an SVG drawing", SAVE_AS_IMAGE),
    (0, b"%pdf", "a PDF document", "save its pages as images, such as PNG"),
    (4, b"ftyphei", "a HEIC photo", "save it as JPEG or PNG"),
    (4, b"ftypmif1", "a HEIC photo", "save it as JPEG or PNG"),
    (4, b"ftypavif", "an AVIF image, which this Pillow does not read", "save it as JPEG or PNG"),
    (4, b"ftyp", "a video", "save the frames that you need as images"),
    (0, b"\x1ae\xdf\xa3", "a video", "save the frames that you need as images"),
    (8, b"avi list", "a video", "save the frames that you need as images"),
    (0, b"pk\x03\x04", "a zip archive, or an Excel file", f"{UNPACK}, or save a sheet as csv"),
    (0, b"\x1f\x8b", "compressed by gzip", f"{UNPACK} or `gzip -d FILE`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"rar!", "a rar archive", "unpack it"),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\xd0\xcf\x11\xe0", "an Excel file of an old kind", "save the sheet as csv"),
    (
        0,
        b"\x93numpy",
        "an array of NumPy",
        "save it as an image, with Image.fromarray(numpy.load(FILE)).save('1.png')",
    ),
    *(
        (0, bytes((0x80, protocol)), "a pickle of Python, which is not opened, since it can run code", SAVE_AS_IMAGE)
        for protocol in range(2, 6)
    ),
    (0, b"par1", "a parquet file", "give it the ending .parquet and name it as a file"),
    (0, b"arrow1", "an arrow file", "give it the ending .arrow and name it as a file"),
    (0, b"\x89hdf", "an HDF5 file", "save the images as files, or a table as csv or parquet"),
    (0, b"sqlite format 3", "an SQLite database", "save its table as csv or parquet"),
)


def foreign_content(source: str | os.PathLike | bytes) -> str | None:
    """
    Returns what a file is and what to do with it, as a part of an error message, or `None` if it cannot be told.

    Args:
        source (`str`, `os.PathLike` or `bytes`):
            The path of a file, or its content, that could not be read as what it should be.

    Example:

    ```py
    >>> foreign_content(b"%PDF-1.7 ...")
    'it is a PDF document; save its pages as images, such as PNG'
    ```
    """
    head = source[:NUM_BYTES] if isinstance(source, bytes) else _read_head(source)
    head = head.removeprefix(b"\xef\xbb\xbf").lower()
    text = head.lstrip()  # of texts, which may begin with spaces
    for place, mark, what, advice in CONTENTS:
        if head[place:].startswith(mark) or (mark.startswith(b"<") and text.startswith(mark)):
            return f"it is {what}; {advice}"
    return None


# What to do with files that are neither images nor tables, by their ending.
ADVICE = {
    **dict.fromkeys(
        (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "Unpack it, and name what it holds."
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "Save the sheet as csv."),
    **dict.fromkeys(
        (".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".feather", ".pt", ".pth", ".tfrecord"),
        "Save its arrays as image files, in one folder for each class, or a table of images as parquet.",
    ),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), "Save the frames that you need as images."),
    ".pdf": "Save its pages as images.",
    ".svg": "Save it as PNG.",
    ".json": "Write one object a line: pandas.read_json(FILE).to_json('NEW.jsonl', orient='records', lines=True).",
    ".txt": "Write it as csv, with a first line that names the columns.",
    **dict.fromkeys(
        (".csv", ".tsv", ".jsonl", ".parquet", ".arrow"), "Give it as a file: --train_file, or files={...}."
    ),
}


def advice_for(path: str | os.PathLike) -> str:
    """Returns a sentence on what to do with a file of this ending, after a space, or an empty text."""
    advice = ADVICE.get(os.path.splitext(path)[1].lower())
    return f" {advice}" if advice else ""


def _read_head(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(NUM_BYTES)
    except OSError:
        return b""


def shown(text: str) -> str:
    """Returns a path, an address or a base64 text as an error message names it."""
    return repr(text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}...")
