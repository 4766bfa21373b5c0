"""The HTTP service of the command `serve`: limits of a request, adapters on one frozen CLIP, and the application."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Annotated

import numpy as np
import torch
from fastapi import FastAPI, Form, HTTPException, UploadFile
from peft import PeftConfig, get_peft_model
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .. import AutoModelForPromptClassification, CLIPPromptTuningConfig
from ..evaluation.conformal import ConformalClassifier
from ..evaluation.conformal_scores import ConformalScores
from ..image_files import UnreadableImageError, decode_image, process_images
from ..tuner.files import WEIGHTS_NAME
from ..tuner.hub import HubSettings, load_image_processor


# Limits of a request. The size of an image is checked before decoding: a file of a few KB can decode to gigabytes.
MAX_IMAGES = 16
MAX_CLASS_NAMES = 500
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # other decoders of Pillow start programs or are little tested

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
UNTRAINED = "-untrained"  # not a valid name; this adapter keeps the PeftModel alive when no other is loaded

Scores = list[tuple[str, float]]  # labels and probabilities, the most probable first


def read_image(data: bytes, name: str = "the image") -> Image.Image:
    """Decodes an upload.

    Args:
        data (`bytes`):
            The content of the file.
        name (`str`, *optional*, defaults to `"the image"`):
            The name of the file in error messages.

    Returns:
        `PIL.Image.Image`: An RGB image, rotated as its EXIF data says.

    Raises:
        HTTPException: 415 if the file is not an image of an allowed format, 413 if it is too large, 422 if it is
            damaged or has values of an unknown range.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)  # reads only the header
    except UnidentifiedImageError:
        raise HTTPException(415, f"{name} is not an image of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise HTTPException(413, f"{name} has too many pixels; {MAX_PIXELS:,} are allowed.") from None
    except Exception as error:  # damaged headers raise errors of any type
        raise HTTPException(422, f"{name} is damaged: {error}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise HTTPException(413, f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed.")
    try:
        return decode_image(image, name)
    except UnreadableImageError as error:
        raise HTTPException(422, str(error)) from None


class LimitBody:
    """
    ASGI middleware that answers 413 to requests with long bodies, without reading more than the limit.

    Args:
        app (`Callable`):
            The ASGI application.
        max_bytes (`int`):
            The largest allowed length of a body.
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

        async def receive_within_limit():  # the header with the length may be missing or wrong
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, message, {"connection": "close"})
            return part

        return await self.app(scope, receive_within_limit, send)


class AdapterStore:
    """
    Loads, unloads and runs adapters on one CLIP, one request at a time.

    Args:
        base (`str`):
            Hub id or folder of the CLIP.
        folder (`Path`):
            The folder whose sub-folders are the adapters. Nothing outside of it is loaded.
        max_loaded (`int`, *optional*, defaults to 500):
            How many adapters may be loaded at the same time.
        only (`Sequence[str]`, *optional*):
            The names of the adapters to take; by default, all in the folder.
        hub (`HubSettings`, *optional*):
            The revision of the CLIP, and so on.
    """

    def __init__(
        self,
        base: str,
        folder: Path,
        max_loaded: int = 500,
        only: Sequence[str] | None = None,
        hub: HubSettings | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.only = only
        self.max_loaded = max_loaded
        self._classifier = AutoModelForPromptClassification.from_pretrained(base, **(hub.arguments if hub else {}))
        self.image_processor = load_image_processor(self._classifier)
        self._model = get_peft_model(self._classifier, CLIPPromptTuningConfig(), adapter_name=UNTRAINED).eval()
        self._lock = Lock()  # active adapter and class names are state of the model
        self._checked_scores: dict[str, ConformalScores] = {}  # of those adapters that were asked for sets
        self._random = np.random.default_rng()
        self._decoding = Lock()  # large images are decoded one at a time

    def available(self) -> list[str]:
        """Returns the names of the adapters in the folder."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if self._is_adapter(path))

    def loaded(self) -> dict[str, list[str]]:
        """Returns the class names of the loaded adapters by name."""
        configs = dict(self._model.peft_config)
        return {name: config.class_names for name, config in sorted(configs.items()) if name != UNTRAINED}

    def load(self, name: str) -> list[str]:
        """Loads an adapter and returns its class names.

        Raises:
            HTTPException: 422 if the name is not allowed or the adapter is damaged, 404 if there is no such adapter,
                409 if it is loaded already or too many are.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise HTTPException(422, f"{name!r} cannot be the name of an adapter: letters, digits, '-' and '_' only.")
        path = self.folder / name
        if not self._is_adapter(path):
            raise HTTPException(404, f"There is no adapter {name!r}; there are {self.available()}.")
        with self._lock:
            loaded = self.loaded()
            if name in loaded:
                raise HTTPException(409, f"The adapter {name!r} is loaded already; unload it first to load it anew.")
            if len(loaded) >= self.max_loaded:
                raise HTTPException(409, f"{self.max_loaded} adapters are loaded, which is the limit; unload one.")
            try:
                check_files(path)
                self._model.load_adapter(path, name)
            except Exception as error:  # damaged files raise errors of any type
                if name in self._model.peft_config:
                    self._model.delete_adapter(name)
                raise HTTPException(422, f"The adapter {name!r} cannot be loaded: {error}") from None
            return self.loaded()[name]

    def load_or_tell(self, name: str) -> None:
        """Loads an adapter at the start, or prints why it cannot be."""
        try:
            self.load(name)
        except HTTPException as error:
            print(f"{name} is not loaded: {error.detail}", file=sys.stderr)

    def unload(self, name: str) -> None:
        """Unloads an adapter. Raises `HTTPException` 404 if it is not loaded."""
        with self._lock:
            self._check_loaded([name])
            self._model.delete_adapter(name)
            self._checked_scores.pop(name, None)

    def classify(
        self, images: Iterable[Image.Image], adapters: Sequence[str], top_k: int, coverage: float | None = None
    ) -> tuple[list[Scores], list[Scores] | None]:
        """Classifies each image with its adapter, all in one pass of the image tower.

        Args:
            images (`Iterable[Image.Image]`):
                The images; an iterator may decode them when they are needed.
            adapters (`Sequence[str]`):
                The name of the adapter for each image.
            top_k (`int`):
                How many labels to return for each image.
            coverage (`float`, *optional*):
                The probability with which a set of classes holds the true one.

        Returns:
            `tuple`: The best labels of each image and, with `coverage`, the labels in its set.

        Raises:
            HTTPException: 404 if an adapter is not loaded, 422 if it has no valid scores for sets of classes.
        """
        inputs = self._inputs(images)
        with self._lock, torch.no_grad():
            self._check_loaded(adapters)
            scores = {name: self._scores(name) for name in dict.fromkeys(adapters)} if coverage is not None else {}
            logits = self._model(**inputs, adapter_names=list(adapters)).logits
            loaded = self.loaded()
            draws = self._random.random(len(adapters))
        answers = [best(of_image, loaded[name], top_k) for of_image, name in zip(logits, adapters)]
        if coverage is None:
            return answers, None
        return answers, [
            in_set(of_image, loaded[name], scores[name], coverage, draw)
            for of_image, name, draw in zip(logits, adapters, draws)
        ]

    def _scores(self, name: str) -> ConformalScores:
        """Returns the scores for sets of classes of an adapter, which are compared with it once."""
        if name not in self._checked_scores:
            active = self._model.active_adapter
            self._model.set_adapter(name)
            try:
                self._checked_scores[name] = ConformalClassifier(self._model, self.image_processor).scores
            except ValueError as error:
                raise HTTPException(422, f"The adapter {name!r} gives no sets of classes: {error}") from None
            finally:
                self._model.set_adapter(active)
        return self._checked_scores[name]

    def classify_zero_shot(self, images: Iterable[Image.Image], class_names: list[str], top_k: int) -> list[Scores]:
        """Classifies all images zero-shot. Raises `HTTPException` 422 if the class names cannot be used."""
        inputs = self._inputs(images)
        with self._lock, torch.no_grad(), self._model.disable_adapter():
            try:
                self._classifier.set_class_names(class_names)  # adapters keep their own
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            logits = self._model(**inputs).logits  # (B, C)
        return [best(of_image, class_names, top_k) for of_image in logits]

    def _inputs(self, images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` (B, 3, H, W), and the other inputs that the model takes."""
        with self._decoding:
            prepared = [process_images(self.image_processor, [image]) for image in images]
            return {name: torch.cat([of_image[name] for of_image in prepared]) for name in prepared[0]}

    def _is_adapter(self, path: Path) -> bool:
        is_inside = path.resolve().parent == self.folder  # a link may lead out of the folder
        is_wanted = self.only is None or path.name in self.only
        return (
            is_wanted
            and bool(ADAPTER_NAME.fullmatch(path.name))
            and is_inside
            and (path / "adapter_config.json").is_file()
        )

    def _check_loaded(self, adapters: Sequence[str]) -> None:
        loaded = self.loaded()
        for name in adapters:
            if name not in loaded:
                raise HTTPException(404, f"The adapter {name!r} is not loaded; loaded are {sorted(loaded)}.")


def check_files(path: Path) -> None:
    """Raises `ValueError` if a folder does not hold the adapter of a classifier."""
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, CLIPPromptTuningConfig):
        raise ValueError(f"it is of type {config.peft_type.value}, and the service takes adapters of prompts.")
    if not config.class_names:
        raise ValueError("it names no classes.")
    if not (path / WEIGHTS_NAME).is_file():  # peft would go on to look for a pickle
        raise ValueError(f"it holds no {WEIGHTS_NAME}.")


def best(logits: torch.Tensor, class_names: list[str], top_k: int) -> Scores:
    """Returns the `top_k` most probable labels of an image's logits (C,)."""
    values, labels = logits.softmax(dim=0).topk(min(top_k, len(class_names)))
    return [(class_names[label], value) for value, label in zip(values.tolist(), labels.tolist())]


def in_set(
    logits: torch.Tensor, class_names: list[str], scores: ConformalScores, coverage: float, draw: float
) -> Scores:
    """Returns the labels in the set of an image's logits (C,), the most probable first."""
    probabilities = logits.double().softmax(dim=0)
    is_in = scores.in_set(probabilities[None].cpu().numpy(), coverage, np.array([draw]))[0]
    order = probabilities.argsort(descending=True, stable=True).tolist()
    return [(class_names[label], probabilities[label].item()) for label in order if is_in[label]]


class Label(BaseModel):
    label: str
    probability: float


class Answer(BaseModel):
    adapter: str | None
    labels: list[Label]
    in_set: list[Label] | None = None  # with `coverage`
    is_unsure: bool | None = None  # whether the set is empty, or of more than `max_set_size` classes


class Adapters(BaseModel):
    loaded: dict[str, list[str]]
    available: list[str]


def create_app(store: AdapterStore, max_upload: int = 10 * 2**20) -> FastAPI:
    """Creates the application.

    Args:
        store (`AdapterStore`):
            The model and its adapters.
        max_upload (`int`, *optional*, defaults to 10 MiB):
            The largest allowed length of a request in bytes.
    """
    app = FastAPI(
        title="Prompt-tuned CLIP", description="Classifies images with any number of adapters on one frozen CLIP."
    )
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

    @app.post("/classify", response_model_exclude_unset=True)
    def classify(
        images: list[UploadFile],
        adapters: Annotated[list[str], Form(default_factory=list)],
        class_names: Annotated[list[str], Form(default_factory=list)],
        top_k: Annotated[int, Form(ge=1)] = 5,
        coverage: Annotated[float | None, Form(gt=0, lt=1)] = None,
        max_set_size: Annotated[int, Form(ge=1)] = 1,
    ) -> list[Answer]:
        """
        Takes either `adapters`, one for all images or one for each, or `class_names`. With neither, the only loaded
        adapter answers. With `coverage`, adapters that were calibrated answer with a set of classes, too, which holds
        the true one with this probability. `is_unsure` says that it is empty, or of more than `max_set_size` classes.
        """
        loaded = [*store.loaded()]
        if not adapters and not class_names and len(loaded) == 1:
            adapters = loaded
        check_request(len(images), len(adapters), len(class_names), loaded)
        pictures = (read_image(upload.file.read(), upload.filename or "the image") for upload in images)
        if class_names:
            if coverage is not None:
                raise HTTPException(422, "coverage goes with adapters that were calibrated, not with class_names.")
            names, scores = [None] * len(images), store.classify_zero_shot(pictures, class_names, top_k)
            sets = None
        else:
            names = adapters * len(images) if len(adapters) == 1 else adapters
            scores, sets = store.classify(pictures, names, top_k, coverage)
        answers = [Answer(adapter=name, labels=as_labels(of_image)) for name, of_image in zip(names, scores)]
        for answer, of_image in zip(answers, sets or ()):
            answer.in_set, answer.is_unsure = as_labels(of_image), not 1 <= len(of_image) <= max_set_size
        return answers

    return app


def as_labels(scores: Scores) -> list[Label]:
    return [Label(label=label, probability=value) for label, value in scores]


def check_request(num_images: int, num_adapters: int, num_class_names: int, loaded: list[str]) -> None:
    """Raises `HTTPException` 413 or 422 for numbers that are too large or do not go together."""
    if num_images > MAX_IMAGES:
        raise HTTPException(413, f"{num_images} images are too many; send at most {MAX_IMAGES} at a time.")
    if num_class_names > MAX_CLASS_NAMES:
        raise HTTPException(413, f"{num_class_names} class names are too many; send at most {MAX_CLASS_NAMES}.")
    if bool(num_adapters) == bool(num_class_names):
        raise HTTPException(422, f"Give either adapters or class_names; the adapters {loaded} are loaded.")
    if num_adapters not in (0, 1, num_images):
        raise HTTPException(
            422, f"Give one adapter for all images, or one for each: got {num_adapters} for {num_images} images."
        )
