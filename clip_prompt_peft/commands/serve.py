"""The command `serve`: classifies images over HTTP with any number of adapters on one frozen CLIP."""

from __future__ import annotations

import argparse
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME

from clip_prompt_cli.parsers import parse

from ..tuner.files import WEIGHTS_NAME, fetch
from .adapters import base_model_of, find_adapters
from .common import (
    check_extra,
    errors_in_one_line,
    silence_libraries,
    stopped_in_one_line,
    use_one_thread_if_tiny,
)


MAX_CONNECTIONS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("serve", arguments)
    silence_libraries(progress_bars=True)
    with stopped_in_one_line(), errors_in_one_line():
        check_extra("serve", "fastapi", "uvicorn", "python_multipart")
        serve(args)


def serve(args: argparse.Namespace) -> None:
    """Finds the adapters, downloads them if they are on the Hub, and serves them."""
    import uvicorn

    from .service import AdapterStore, create_app

    adapters = find_adapters(args.adapters)
    check_address(args.host, args.port)
    base, hub = base_model_of(adapters, args.base, args.base_revision)
    use_one_thread_if_tiny(base)
    with TemporaryDirectory() as downloads:
        adapters = in_folders(adapters, downloads)
        folder = Path(args.adapters).expanduser().resolve()
        first = Path(next(iter(adapters.values()))).resolve()
        is_alone = first.parent != folder  # other folders beside it are not meant
        store = AdapterStore(base, first.parent, args.max_adapters, [*adapters] if is_alone else None, hub)
        for name in adapters:
            store.load_or_tell(name)
        if not store.loaded():
            raise ValueError(f"No adapter of {args.adapters!r} can be served, for the reasons printed above.")
        print(f"Loaded from {args.adapters}: {', '.join(store.loaded())}", flush=True)
        app = create_app(store, args.max_upload)
        uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=MAX_CONNECTIONS)
    raise KeyboardInterrupt  # uvicorn ends, without one, only by a signal


def in_folders(adapters: Mapping[str, str], downloads: str) -> dict[str, str]:
    """Returns the folder of each adapter by name; those on the Hub are copied.

    Args:
        adapters (`Mapping[str, str]`):
            The folder or Hub id of each adapter by name.
        downloads (`str`):
            An empty folder for the copies.

    Raises:
        OSError: If an adapter cannot be downloaded.
    """
    folders = {}
    for name, path in adapters.items():
        if not Path(path).is_dir():
            name = re.sub(r"[^A-Za-z0-9_-]", "-", name)  # as it may stand in addresses
            copy = Path(downloads, name)
            copy.mkdir()
            for file in (CONFIG_NAME, WEIGHTS_NAME):  # nothing else is needed, nor trusted
                shutil.copy(fetch(path, file), copy / file)
            path = str(copy)
        folders[name] = path
    return folders


def check_address(host: str, number: int) -> None:
    """Raises `ValueError` if nothing can listen there, before any model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"The address {host}:{number} cannot be used ({error.strerror or error}); choose another --port or --host."
        ) from None


if __name__ == "__main__":
    main()
