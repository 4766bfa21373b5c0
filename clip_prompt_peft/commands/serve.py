"""Images from strangers: what is let in, and what is not.

An upload is looked at before it is decoded: a file of a few KB can hold a picture of gigabytes, and a picture of one
pixel's height becomes one of gigabytes when it is scaled to the model's size.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Form, HTTPException, UploadFile
from peft import PeftConfig, get_peft_model
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from transformers import AutoImageProcessor

from .. import AutoModelForPromptClassification, CLIPPromptTuningConfig
from ..assets import TINY_CLIP
from ..tuner.files import WEIGHTS_NAME
from .arguments import use_one_thread_if_tiny


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's readers of some others start programs or are little tested


MAX_PIXELS = 50_000_000


MAX_RATIO = 16  # of the longer side to the shorter


def read_image(data: bytes, name: str = "the image") -> Image.Image:
    """Decodes an upload.

    Args:
        data: the bytes of the file.
        name: what to call it in errors.

    Returns:
        An RGB image, turned upright.

    Raises:
        HTTPException: 415 for what is no image of an allowed format, 413 for one that is too large or too elongated,
            422 for one that is damaged.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)  # reads the header only
    except UnidentifiedImageError:
        raise HTTPException(415, f"{name} is not an image of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise HTTPException(413, f"{name} has too many pixels; {MAX_PIXELS:,} are allowed.") from None
    except Exception as error:  # broken headers raise whatever they happen to
        raise HTTPException(422, f"{name} is damaged: {error}") from None
    check_size(*image.size, name)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # and so do broken pixels
        raise HTTPException(422, f"{name} is damaged: {error}") from None


def check_size(width: int, height: int, name: str) -> None:
    """Raises `HTTPException` 413 for an image that would take too much memory once it is decoded and scaled."""
    if width * height > MAX_PIXELS:
        raise HTTPException(413, f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise HTTPException(
            413, f"{name} has {width} x {height} pixels; the longer side may be {MAX_RATIO} times the shorter one."
        )


class LimitBody:
    """
    ASGI middleware that answers 413 to requests with long bodies, before more than that much of them is read.

    Args:
        app: the application.
        max_bytes: of a request's body.
    """

    def __init__(self, app, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"The request is too long; at most {self.max_bytes:,} bytes are allowed."
        if int(Headers(scope=scope).get("content-length", 0)) > self.max_bytes:
            answer = JSONResponse({"detail": message}, 413, {"connection": "close"})
            return await answer(scope, receive, send)
        received = 0

        async def receive_within_limit():  # the length need not be told beforehand, nor truthfully
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, message, {"connection": "close"})
            return part

        return await self.app(scope, receive_within_limit, send)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


UNTRAINED = "_untrained"  # no name of an adapter; keeps the PeftModel alive while no other is loaded


Scores = list[tuple[str, float]]  # label and probability, the most probable first


class AdapterStore:
    """
    Loads, unloads and runs adapters, one request at a time.

    Args:
        base: Hub id or folder of the CLIP.
        folder: the only place where adapters may come from.
        max_loaded: how many may be loaded at the same time.
    """

    def __init__(self, base: str, folder: Path, max_loaded: int = 500) -> None:
        self.folder = folder.resolve()
        self.max_loaded = max_loaded
        self.image_processor = AutoImageProcessor.from_pretrained(base)
        self._classifier = AutoModelForPromptClassification.from_pretrained(base)
        self._model = get_peft_model(self._classifier, CLIPPromptTuningConfig(), adapter_name=UNTRAINED).eval()
        self._lock = Lock()  # whoever switches adapters must be alone
        self._decoding = Lock()  # large pictures, one at a time

    def available(self) -> list[str]:
        """Names that can be loaded."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if self._is_adapter(path))

    def loaded(self) -> dict[str, list[str]]:
        """Class names by adapter."""
        configs = dict(self._model.peft_config)
        return {name: config.class_names for name, config in sorted(configs.items()) if name != UNTRAINED}

    def load(self, name: str) -> list[str]:
        """Loads an adapter and returns its class names.

        Raises:
            HTTPException: 422 for a name that cannot be one, or an adapter that cannot be used; 404 if there is none;
                409 if it is loaded already, or too many are.
        """
        path = self._path_of(name)
        with self._lock:
            loaded = self.loaded()
            if name in loaded:
                raise HTTPException(409, f"The adapter {name!r} is loaded already; unload it first to load it anew.")
            if len(loaded) >= self.max_loaded:
                raise HTTPException(409, f"{self.max_loaded} adapters are loaded, which is the limit; unload one.")
            try:
                _check_files(path)
                self._model.load_adapter(path, name)
            except Exception as error:  # damaged files raise whatever they happen to
                if name in self._model.peft_config:
                    self._model.delete_adapter(name)
                raise HTTPException(422, f"The adapter {name!r} cannot be loaded: {error}") from None
            return self.loaded()[name]

    def unload(self, name: str) -> None:
        """Raises `HTTPException` 404 if no such adapter is loaded."""
        with self._lock:
            self._check_loaded([name])
            self._model.delete_adapter(name)

    def classify(self, images: Iterable[Image.Image], adapters: Sequence[str], top_k: int) -> list[Scores]:
        """Scores each image by its adapter, all in one pass of the image tower.

        Args:
            images: decoded as they are asked for.
            adapters: one for each image.
            top_k: how many labels to return of each.

        Raises:
            HTTPException: 404 if an adapter is not loaded; whatever decoding raises.
        """
        inputs = self._inputs(images)
        with self._lock, torch.no_grad():
            self._check_loaded(adapters)
            logits = self._model(**inputs, adapter_names=list(adapters)).logits
            loaded = self.loaded()
        return [_best(row, loaded[name], top_k) for row, name in zip(logits, adapters)]

    def classify_zero_shot(self, images: Iterable[Image.Image], class_names: list[str], top_k: int) -> list[Scores]:
        """Scores all images by names of the moment.

        Raises:
            HTTPException: 422 for names that cannot be used.
        """
        inputs = self._inputs(images)
        with self._lock, torch.no_grad(), self._model.disable_adapter():
            try:
                self._classifier.set_class_names(class_names)  # adapters have their own
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            logits = self._model(**inputs).logits  # (B, C)
        return [_best(row, class_names, top_k) for row in logits]

    def _inputs(self, images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, H, W), and what else the model takes of images."""
        with self._decoding:
            prepared = [self.image_processor(image, return_tensors="pt") for image in images]
            return {name: torch.cat([of_image[name] for of_image in prepared]) for name in prepared[0]}

    def _is_adapter(self, path: Path) -> bool:
        # a link that leads out of the folder is none
        inside = path.resolve().parent == self.folder
        return bool(NAME.fullmatch(path.name)) and inside and (path / "adapter_config.json").is_file()

    def _path_of(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise HTTPException(422, f"{name!r} cannot be the name of an adapter: letters, digits, '-' and '_' only.")
        path = self.folder / name
        if not self._is_adapter(path):
            raise HTTPException(404, f"There is no adapter {name!r}; there are {self.available()}.")
        return path

    def _check_loaded(self, adapters: Sequence[str]) -> None:
        loaded = self.loaded()
        for name in adapters:
            if name not in loaded:
                raise HTTPException(404, f"The adapter {name!r} is not loaded; loaded are {sorted(loaded)}.")


def _check_files(path: Path) -> None:
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, CLIPPromptTuningConfig):
        raise ValueError(f"it is of type {config.peft_type}, not of CLIP prompt tuning.")
    if not config.class_names:
        raise ValueError("it names no classes.")
    if not (path / WEIGHTS_NAME).is_file():  # peft would go on to look for a pickle
        raise ValueError(f"it holds no {WEIGHTS_NAME}.")


def _best(logits: torch.Tensor, class_names: list[str], top_k: int) -> Scores:
    """`top_k` labels of an image's logits (C,)."""
    values, labels = logits.softmax(dim=0).topk(min(top_k, len(class_names)))
    return [(class_names[label], value) for value, label in zip(values.tolist(), labels.tolist())]


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
