"""One frozen CLIP and the prompt adapters that are loaded on it.

Adapters come from one folder, by the names of its sub-folders, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import torch
from fastapi import HTTPException
from peft import PeftConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor

from clip_prompt_peft import AutoModelForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.adapter_files import WEIGHTS_NAME


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
