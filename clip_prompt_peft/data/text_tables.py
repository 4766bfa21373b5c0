"""Reading csv and tsv files as they are written, whatever their encoding and separator, and checks of text files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
from datasets import Dataset

from ..class_names import without_invisible
from ..file_contents import foreign_content


logger = logging.getLogger(__name__)

# Only an empty field has no value: "NA" and "None" may be classes. The type of a column is guessed from all its rows.
AS_WRITTEN = {"keep_default_na": False, "na_values": [""], "low_memory": False}
SEPARATORS = (",", ";", "\t", "|")
MARKS = {  # what a file of another encoding begins with; the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
UTF_8 = "utf-8-sig"  # with or without a mark
HOW_TO_SAVE = (
    "Save it as UTF-8, which spreadsheets call 'CSV UTF-8', or convert it with pathlib: "
    "Path(NEW).write_text(Path(FILE).read_text(ENCODING), 'utf-8')"
)


def unreadable(files: Sequence[str], builder: str, reason: BaseException) -> ValueError:
    """Returns the error for files that cannot be read as what they are called."""
    found = next(filter(None, map(foreign_content, files)), None)
    what = None if found and f"{builder} file" in found else found  # which is damaged
    text = (str(reason) or type(reason).__name__).rstrip(".")
    advice = (
        f"In fact {what}."
        if what
        else ("The file is damaged, empty or of another format, or files have different columns; write it again.")
    )
    return ValueError(f"Cannot read {', '.join(map(repr, files))} as {builder}: {text}. {advice}")


def encoding_of(file: str) -> str:
    """
    Returns the encoding of a text file: UTF-8, or the one that its mark names.

    Raises:
        ValueError: If the file is no text, or its text is of an unknown encoding.
    """
    what = foreign_content(file)
    if what is not None:
        raise ValueError(f"Cannot read {file!r}: {what}.")
    with open(file, "rb") as opened:
        head = opened.read(4096)
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding
        if b"\0" in head:
            raise ValueError(
                f"Cannot read {file!r}: it has bytes that are zero, as no text in UTF-8 has. It is UTF-16 without a "
                f"mark, or no text at all. {HOW_TO_SAVE}, with 'utf-16-le' as ENCODING."
            )
        opened.seek(0)
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                around = line[max(error.start - 10, 0) : error.start + 10].decode("latin-1")
                raise ValueError(
                    f"Cannot read {file!r}: line {number} is not in UTF-8. It has the byte {line[error.start]:#04x}, "
                    f"which in Latin-1 reads {around!r}. {HOW_TO_SAVE}, where ENCODING is the one that it was "
                    "written in, such as 'latin-1' or 'cp1252'."
                ) from error
    return UTF_8


def check_is_utf_8(file: str) -> None:
    """Raises `ValueError` for a text file of another encoding, which only csv and tsv files may have."""
    encoding = encoding_of(file)
    if encoding != UTF_8:
        raise ValueError(f"Cannot read {file!r}: it is in {encoding}. {HOW_TO_SAVE}, with {encoding!r} as ENCODING.")


def read_csv(file: str, settings: dict) -> Dataset:
    """
    Reads a csv or tsv file at once. `datasets` guesses types for each 10,000 rows: the class `007` becomes `7`.

    Args:
        file (`str`):
            The file.
        settings (`dict`):
            Settings of pandas.

    Raises:
        ValueError: If it cannot be read, is empty, or has rows of more fields than its head.
    """
    settings = {**settings, **_dialect(file, settings.get("sep", ","))}
    try:
        frame = pd.read_csv(file, **settings)
        if not len(frame):
            raise ValueError("It has no rows")
        frame.columns = [without_invisible(str(name)).strip() for name in frame.columns]
        empty = [name for name in frame.columns if frame[name].isna().all()]
        table = Dataset.from_pandas(frame.astype(dict.fromkeys(empty, object)), preserve_index=False)
    except (ValueError, pa.ArrowException) as error:  # errors of pandas are of these types
        raise unreadable([file], "csv", error) from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the fields in front for names of the rows
        raise ValueError(
            f"The rows of {file!r} have {len(frame.columns) + frame.index.nlevels} fields, but its head has only "
            f"{len(frame.columns)}: {', '.join(map(str, frame.columns))}. Put class names and paths that hold a "
            "separator in double quotes, or name all columns in the head."
        )
    return table


def _dialect(file: str, usual: str) -> dict:
    """Returns the encoding and the separator of a csv file as settings of pandas."""
    encoding = encoding_of(file)
    with open(file, encoding=encoding) as opened:
        head = next((line.rstrip("\r\n") for line in opened if line.strip()), "")
    if declared := re.fullmatch(r'"?sep=(.)"?', head):  # Excel writes it
        return {"encoding": encoding, "sep": declared[1], "skiprows": 1}
    others = [separator for separator in SEPARATORS if separator in head]
    if usual in head or len(others) != 1:
        return {"encoding": encoding, "sep": usual}
    logger.warning("The columns of %r are taken to be separated by %r, as in its head: %r.", file, others[0], head)
    return {"encoding": encoding, "sep": others[0]}
