"""Writing a folder so that a full disk or a killed process never leaves half a file in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing_files(folder: str | os.PathLike, kept: Sequence[str], last: str) -> Iterator[str]:
    """Gives a new folder to write into; what is in it then replaces the files of the same names in `folder`.

    If the body raises, `folder` stays as it is. A link in the place of a file is replaced, not followed.

    Args:
        folder: to change; exists.
        kept: names of files that the body reads and changes; the new folder has copies of them.
        last: name of the files without which the others are nothing. They come last, and old ones that differ go
            first: whoever is killed in between leaves a folder that is refused, and not a mixture of old and new.
    """
    with TemporaryDirectory(dir=folder, prefix=".saving-") as new:
        for name in kept:
            if os.path.isfile(os.path.join(folder, name)):
                shutil.copy(os.path.join(folder, name), new)
        yield new
        files = sorted((file for file in Path(new).rglob("*") if file.is_file()), key=lambda file: file.name == last)
        targets = {file: Path(folder) / file.relative_to(new) for file in files}
        for file, target in targets.items():
            if file.name == last and target.is_file() and target.read_bytes() != file.read_bytes():
                target.unlink()
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
