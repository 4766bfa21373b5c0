"""Where the files of an open_clip checkpoint are, in a folder or on the Hub, and what is made of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import AutoTokenizer, BaseImageProcessor, PreTrainedConfig
from transformers.utils import cached_file

from ..file_contents import foreign_content
from .config import OpenClipConfig, read_config
from .processing import has_own_tokenizer, make_image_processor, make_tokenizer, prepared
from .weights import convert, read_tensors


CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class OpenClipCheckpoint:
    """
    A checkpoint of open_clip in a folder or on the Hub.

    Args:
        name_or_path (`str`):
            The folder or Hub id.
        hub (`dict`):
            The arguments about the Hub, as of `from_pretrained`.
        config_file (`str`):
            The path of its `open_clip_config.json`.
    """

    name_or_path: str
    hub: dict = field(repr=False)
    config_file: str

    @cached_property
    def open_clip_config(self) -> OpenClipConfig:
        """The configuration. Raises `ValueError` if it is damaged, or of a model that transformers cannot express."""
        try:
            with open(self.config_file, encoding="utf-8") as file:
                content = json.load(file)
        except ValueError as error:
            reason = foreign_content(self.config_file) or "download or save it again"
            raise ValueError(f"{self.config_file!r} is damaged ({error}); {reason}.") from error
        return read_config(content, self.name_or_path)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the equal model in transformers."""
        return self.open_clip_config.transformers

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the equal model in transformers.

        Raises:
            OSError: If there are no weights, or they cannot be fetched.
            ValueError: If the weights are damaged, do not fit the configuration, or hold more than tensors.
        """
        config = self.open_clip_config  # before anything is downloaded
        path = next(filter(None, map(self._file, WEIGHTS_FILES)), None)
        if path is None:
            raise OSError(
                f"{self.name_or_path!r} holds {CONFIG_FILE} and no weights; there must be "
                f"{' or '.join(WEIGHTS_FILES)}."
            )
        return convert(config, read_tensors(path), path)

    def tokenizer(self):
        """Returns the tokenizer.

        OpenAI's byte pairs come with this package. Another tokenizer has its files beside the weights, or is loaded
        from the repository that the configuration names.

        Raises:
            OSError: If it cannot be loaded.
            ValueError: If none is known.
        """
        config = self.open_clip_config
        if has_own_tokenizer(config):
            return make_tokenizer(config)
        if any(map(self._file, TOKENIZER_FILES)):
            tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, trust_remote_code=False, **self.hub)
        elif (name := config.text["hf_tokenizer_name"]) and name != self.name_or_path:
            elsewhere = {key: value for key, value in self.hub.items() if key not in ("revision", "subfolder")}
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **elsewhere)
        else:
            raise ValueError(
                f"There are no files of a tokenizer in {self.name_or_path!r}, whose vocabulary of "
                f"{config.text['vocab_size']} is not that of OpenAI."
            )
        return prepared(tokenizer, config)

    def image_processor(self) -> BaseImageProcessor:
        """Returns the image processor of open_clip's evaluation."""
        return make_image_processor(self.open_clip_config)

    def _file(self, filename: str) -> str | None:
        return _find(self.name_or_path, filename, self.hub)


def find_checkpoint(name_or_path: str | os.PathLike, **hub) -> OpenClipCheckpoint | None:
    """Returns the open_clip checkpoint in a folder or repository; `None` if there is none, or one of transformers.

    Args:
        name_or_path (`str` or `os.PathLike`):
            The folder or Hub id.
        hub:
            The arguments about the Hub, as of `from_pretrained`.

    Raises:
        OSError: If the repository cannot be accessed.
    """
    config = _find(name_or_path, "config.json", hub)
    if config is not None and _names_a_model_type(config):
        return None
    path = _find(name_or_path, CONFIG_FILE, hub)
    return None if path is None else OpenClipCheckpoint(str(name_or_path), hub, path)


def _names_a_model_type(config_file: str) -> bool:
    try:
        with open(config_file, encoding="utf-8") as file:
            return "model_type" in json.load(file)
    except (ValueError, TypeError):  # transformers will say it
        return True


def _find(name_or_path: str | os.PathLike, filename: str, hub: dict) -> str | None:
    return cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub)
