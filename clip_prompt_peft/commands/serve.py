#!/usr/bin/env python
"""Answers which class images belong to, over HTTP: one frozen CLIP, any number of prompt adapters.

    python serve.py --base openai/clip-vit-base-patch16 --adapters outputs/prompt_tuning

    curl localhost:8000/adapters                                                       # loaded, and available
    curl -X PUT localhost:8000/adapters/seed1                                          # load
    curl -F images=@cat.jpg -F adapters=seed1 localhost:8000/classify
    curl -F images=@cat.jpg -F images=@owl.png -F adapters=seed1 -F adapters=seed2 localhost:8000/classify
    curl -F images=@cat.jpg -F class_names=cat -F class_names=dog localhost:8000/classify   # zero-shot
    curl -X DELETE localhost:8000/adapters/seed1                                       # unload

Try it in a browser at /docs. Needs `pip install 'clip_prompt_peft[serve]'`. Whoever reaches the service may load and
unload adapters of that one folder, so it listens on this machine only unless told otherwise.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Annotated

import uvicorn
from embedded_data import TINY_CLIP, use_one_thread_if_tiny
from fastapi import FastAPI, Form, HTTPException, UploadFile
from pydantic import BaseModel
from serve_adapters import AdapterStore, Scores
from serve_images import LimitBody, read_image


MAX_UPLOAD = 10 * 2**20  # bytes of a request
MAX_IMAGES = 16  # of a request
MAX_CLASS_NAMES = 500
MAX_CONNECTIONS = 64


class Label(BaseModel):
    label: str
    probability: float


class Answer(BaseModel):
    adapter: str | None
    labels: list[Label]


class Adapters(BaseModel):
    loaded: dict[str, list[str]]
    available: list[str]


def create_app(store: AdapterStore, max_upload: int = MAX_UPLOAD) -> FastAPI:
    """The application.

    Args:
        store: the model and its adapters.
        max_upload: bytes that a request may have.
    """
    app = FastAPI(title="Prompt-tuned CLIP", description=__doc__)
    app.add_middleware(LimitBody, max_bytes=max_upload)

    @app.get("/adapters")
    def list_adapters() -> Adapters:
        return Adapters(loaded=store.loaded(), available=store.available())

    @app.put("/adapters/{name}")
    def load_adapter(name: str) -> list[str]:
        return store.load(name)

    @app.delete("/adapters/{name}", status_code=204, response_model=None)  # fastapi 0.115 takes "None" for a body
    def unload_adapter(name: str) -> None:
        store.unload(name)

    @app.post("/classify")
    def classify(
        images: list[UploadFile],
        adapters: Annotated[list[str], Form(default_factory=list)],
        class_names: Annotated[list[str], Form(default_factory=list)],
        top_k: Annotated[int, Form(ge=1)] = 5,
    ) -> list[Answer]:
        """Either `adapters`, one for all images or one for each, or `class_names`."""
        check_request(len(images), len(adapters), len(class_names))
        pictures = (read_image(upload.file.read(), upload.filename or "the image") for upload in images)
        if class_names:
            return answers([None] * len(images), store.classify_zero_shot(pictures, class_names, top_k))
        names = adapters * len(images) if len(adapters) == 1 else adapters
        return answers(names, store.classify(pictures, names, top_k))

    return app


def check_request(num_images: int, num_adapters: int, num_class_names: int) -> None:
    if num_images > MAX_IMAGES:
        raise HTTPException(413, f"{num_images} images are too many; send at most {MAX_IMAGES} at a time.")
    if num_class_names > MAX_CLASS_NAMES:
        raise HTTPException(413, f"{num_class_names} class names are too many; send at most {MAX_CLASS_NAMES}.")
    if bool(num_adapters) == bool(num_class_names):
        raise HTTPException(422, "Give either adapters or class_names.")
    if num_adapters not in (0, 1, num_images):
        raise HTTPException(
            422, f"Give one adapter for all images, or one for each: got {num_adapters} for {num_images} images."
        )


def answers(adapters: list[str | None], scores: list[Scores]) -> list[Answer]:
    return [
        Answer(adapter=name, labels=[Label(label=label, probability=value) for label, value in of_image])
        for name, of_image in zip(adapters, scores)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY_CLIP, help="CLIP of the adapters; by default the embedded tiny one")
    parser.add_argument(
        "--adapters", type=Path, default=Path("outputs/prompt_tuning"), help="folder whose sub-folders are adapters"
    )
    parser.add_argument("--max_adapters", type=int, default=500, help="that are loaded at the same time")
    parser.add_argument("--max_upload", type=int, default=MAX_UPLOAD, help="bytes that a request may have")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    use_one_thread_if_tiny(args.base)
    store = AdapterStore(args.base, args.adapters, args.max_adapters)
    print(f"In {args.adapters}: {', '.join(store.available()) or 'no adapters yet'}", flush=True)
    app = create_app(store, args.max_upload)
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=MAX_CONNECTIONS)


if __name__ == "__main__":
    main()
