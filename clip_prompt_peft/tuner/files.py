"""The two files of an adapter: fetched, and looked at before anything is made of them.

An adapter may come from anybody. peft and transformers load every tensor of its file that has the name of one of the
model's, so that, unlooked at, a file could change the frozen model that it is loaded into.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import cached_file


METHOD = "CLIP_PROMPT_TUNING"
OF_ADAPTER = re.compile(r"(^|\.)learnable_\w+(\.(weight|bias))?")
LARGEST = torch.finfo(torch.float16).max  # no training comes near it, and beyond it half precision has only Inf


def fetch(name_or_path: str | os.PathLike, filename: str, **kwargs) -> str | None:
    """`cached_file`, with an `OSError` for whatever goes wrong on the way."""
    try:
        return cached_file(name_or_path, filename, **kwargs)
    except OSError:
        raise
    except Exception as error:  # of the HTTP library: a connection that breaks off
        raise OSError(f"{filename} of {str(name_or_path)!r} could not be downloaded: {error}") from error


def read_config(path: str) -> PeftConfig:
    """The configuration in an `adapter_config.json`, of whatever method.

    Raises:
        ValueError: it is damaged, or of a method that is not known here.
    """
    try:
        return PeftConfig.from_pretrained(os.path.dirname(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); download or save the adapter again.") from error
    except ValueError as error:
        if type(error) is ValueError:  # says what is wrong
            raise
        raise ValueError(f"{path} is damaged ({error}); download or save the adapter again.") from error
    except (TypeError, KeyError, AttributeError, RecursionError) as error:  # peft does not expect other forms
        raise ValueError(
            f"{path} is no configuration of an adapter, or of an unknown method ({type(error).__name__}: {error}); "
            "download or save the adapter again."
        ) from error


def fetch_weights(name_or_path: str | os.PathLike, config: PeftConfig, **kwargs) -> str:
    """The path of the adapter's weights, which have been looked at.

    Raises:
        OSError: they cannot be fetched.
        ValueError: there are only pickled ones, or they are damaged, or not those of a prompt adapter.
    """
    try:
        path = fetch(name_or_path, WEIGHTS_NAME, **kwargs)
    except OSError as error:
        if error.__cause__ is not None:  # no access, no answer, ...
            raise
        raise ValueError(  # peft would go on to look for adapter_model.bin, a pickle
            f"{str(name_or_path)!r} holds no {WEIGHTS_NAME}. Weights in other formats are pickles, which can run code "
            "when they are opened, and are not loaded; save the adapter again with save_pretrained (safetensors)."
        ) from None
    try:
        with safe_open(path, framework="pt") as file:  # reads the header, which tells the length of the file
            names = list(file.keys())
        check_names(names, config)
        check_values(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); download or save the adapter again.") from error
    return path


def check_adapter(name_or_path: str | os.PathLike, **kwargs) -> None:
    """Raises `ValueError` for a prompt adapter that is damaged or not to be trusted; others are left to peft."""
    path = fetch(name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **kwargs)
    config = None if path is None else read_config(path)
    if config is not None and config.peft_type == METHOD:
        fetch_weights(name_or_path, config, **kwargs)


def check_folder(name_or_path: str | os.PathLike | None) -> None:
    """[`check_adapter`] for a folder with one in it, which is to name its base model unless that lies beside it."""
    path = os.path.join(name_or_path or "", CONFIG_NAME)
    if name_or_path is None or not os.path.isfile(path):
        return
    check_adapter(name_or_path)
    if not read_config(path).base_model_name_or_path and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise ValueError(f"The adapter {str(name_or_path)!r} does not name its base model.")


def check_adapter_to_load(peft_model_id: str | None, adapter_kwargs=None, load_config=None, **kwargs) -> None:
    """[`check_adapter`] with the arguments of transformers' `load_adapter`."""
    if peft_model_id is None:  # the tensors come from memory
        return
    options = {**kwargs, **getattr(load_config, "download_kwargs", {}), **(adapter_kwargs or {})}
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    check_adapter(peft_model_id, **{name: options[name] for name in names if options.get(name) is not None})


def check_names(names: Iterable[str], config: PeftConfig) -> None:
    """Raises `ValueError` if a tensor belongs neither to the prompts nor to a module in `modules_to_save`."""
    modules = [f".{name}." for name in config.modules_to_save or ()]
    for name in names:
        if not OF_ADAPTER.search(name) and not any(module in f".{name}" for module in modules):
            raise ValueError(
                f"The adapter's weights hold {name!r}, which is no part of a prompt adapter and would change the "
                "frozen model; the file is damaged, or not to be trusted."
            )


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` for a tensor that is not of floating point numbers, or holds NaN, Inf or absurd ones."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"The adapter's {name!r} is of {tensor.dtype}, not of floating point numbers.")
        if not (tensor.detach().float().abs() <= LARGEST).all():
            raise ValueError(
                f"The adapter's {name!r} holds NaN, Inf or numbers beyond {LARGEST:g}: its training diverged, or the "
                "file is damaged. Take an earlier version of it, or train it again."
            )
