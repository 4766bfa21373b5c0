"""Classifies images over HTTP with any number of adapters on one frozen CLIP.

    python -m clip_prompt_peft.commands.serve outputs/prompt_tuning
    curl -F images=@cat.jpg -F adapters=seed1 http://127.0.0.1:8000/classify

Adapters that are there at the start are loaded. `curl -X PUT http://127.0.0.1:8000/adapters/NAME` loads one that comes
later, and `-X DELETE` unloads one. There is no authentication, and by default the service listens on this machine
only. Needs the packages of the extra `serve`.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from .adapters import add_adapters_arguments, add_base_arguments, base_model_of, find_adapters
from .common import (
    argument_parser,
    check_extra,
    errors_in_one_line,
    port,
    positive,
    silence_libraries,
    stopped_in_one_line,
    use_one_thread_if_tiny,
)


MAX_CONNECTIONS = 64


def main() -> None:
    args = parse_arguments()
    silence_libraries(progress_bars=True)
    with stopped_in_one_line(), errors_in_one_line():
        check_extra("serve", "fastapi", "uvicorn", "python_multipart")
        serve(args)


def serve(args: argparse.Namespace) -> None:
    import uvicorn

    from .service import AdapterStore, create_app

    adapters = find_adapters(args.adapters)
    if not all(Path(path).is_dir() for path in adapters.values()):
        raise ValueError(
            f"{args.adapters!r} is on the Hub; download it first: hf download {args.adapters} --local-dir DIR."
        )
    check_address(args.host, args.port)
    base, hub = base_model_of(adapters, args.base, args.base_revision)
    use_one_thread_if_tiny(base)
    is_alone = len(adapters) == 1 and Path(args.adapters).resolve() == Path(next(iter(adapters.values()))).resolve()
    folder = Path(args.adapters).resolve()
    parent, only = (folder.parent, [*adapters]) if is_alone else (folder, None)
    store = AdapterStore(base, parent, args.max_adapters, only, hub)
    for name in adapters:
        store.load_or_tell(name)
    print(f"Loaded from {args.adapters}: {', '.join(store.loaded()) or 'no adapters'}", flush=True)
    app = create_app(store, args.max_upload)
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=MAX_CONNECTIONS)
    raise KeyboardInterrupt  # uvicorn ends, without one, only by a signal


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


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_base_arguments(parser)
    add_adapters_arguments(
        parser,
        default="outputs/prompt_tuning",
        help="an adapter, or a folder whose sub-folders are adapters (default: outputs/prompt_tuning)",
    )
    parser.add_argument("--max_adapters", type=positive, default=500, help="how many may be loaded at the same time")
    parser.add_argument("--max_upload", type=positive, default=10 * 2**20, help="bytes that a request may have")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=port, default=8000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
