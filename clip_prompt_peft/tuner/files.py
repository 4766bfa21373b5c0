"""Reading the two files of an adapter, its configuration and its weights, and judging them before they are used.

An adapter can come from anybody. peft and transformers load every tensor of its file that has the name of a tensor of
the model, so that an unchecked file could change the frozen model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import cached_file

from ..file_contents import foreign_content
from ..open_clip import CONFIG_FILE as OPEN_CLIP_CONFIG


# The names of the tensors of each method. In a model, they lie in containers that hold nothing but adapters.
ADAPTER_TENSORS = {
    "CLIP_PROMPT_TUNING": re.compile(r"(^|\.)learnable_\w+(\.(weight|bias|running_mean|running_var))?"),
    "CLIP_CLASS_HEAD": re.compile(r"(^|\.)(class_head\.ln_tuning_head\.\w+|ln_tuning_layers\.(weight|bias))$"),
}
INDEX = "labels"  # the last part of the name of a tensor of class indices
LARGEST = torch.finfo(torch.float16).max  # no training comes near it, and half precision has only Inf beyond it
CHECKPOINT = re.compile(r"checkpoint-\d+")  # of a Trainer
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def fetch(name_or_path: str | os.PathLike, filename: str, **kwargs) -> str | None:
    """Returns the path of a file in a folder or on the Hub, as `cached_file`; any failure is an `OSError`."""
    try:
        return cached_file(name_or_path, filename, **kwargs)
    except OSError as error:
        if filename == CONFIG_NAME and (found := adapter_folders(name_or_path)):
            names = ", ".join(map(repr, found))
            raise OSError(
                f"{str(name_or_path)!r} holds no {CONFIG_NAME}, but folders of adapters; name one: {names}."
            ) from error
        if filename == CONFIG_NAME and os.path.isdir(name_or_path):
            raise OSError(
                f"The folder {str(name_or_path)!r} holds no {CONFIG_NAME}, so it is no adapter; name the folder that "
                "save_pretrained or the Trainer wrote."
            ) from error
        if filename == CONFIG_NAME and error.__cause__ is None and not os.path.exists(name_or_path):
            raise OSError(
                f"{error} If the adapter is in a folder of the repository, name it with subfolder='FOLDER'; for a "
                f"command, download it first: hf download {name_or_path} --local-dir DIR."
            ) from error
        if str(name_or_path) not in str(error):  # of several repositories, it must be told which one
            raise OSError(f"{filename} of {str(name_or_path)!r} could not be loaded: {error}") from error.__cause__
        raise
    except Exception as error:  # of the HTTP library, such as a connection that breaks off
        raise OSError(f"{filename} of {str(name_or_path)!r} could not be downloaded: {error}") from error


def adapter_folders(folder: str | os.PathLike) -> list[str]:
    """Returns the sub-folders of a folder that are adapters and no checkpoints, seed2 before seed10."""
    found = [path.parent for path in Path(folder).glob(f"*/{CONFIG_NAME}") if not CHECKPOINT.match(path.parent.name)]
    parts = {path: re.split(r"(\d+)", path.name) for path in found}  # text and numbers in turn
    keys = {path: [int(part) if part.isdecimal() else part for part in names] for path, names in parts.items()}
    return [str(path) for path in sorted(found, key=keys.__getitem__)]


def read_config(path: str) -> PeftConfig:
    """Reads an `adapter_config.json` of any method.

    Raises:
        ValueError: If it is damaged, or of an unknown method.
    """
    try:
        return PeftConfig.from_pretrained(os.path.dirname(path))
    except ValueError as error:
        if type(error) is ValueError:  # it says what is wrong; subclasses are about JSON and Unicode
            raise
        reason = foreign_content(path) or "download or save the adapter again"
        raise ValueError(f"{path} is damaged ({error}); {reason}.") from error
    except (TypeError, KeyError, AttributeError, RecursionError) as error:  # peft does not expect other content
        raise ValueError(
            f"{path} is no configuration of an adapter, or of an unknown method ({type(error).__name__}: {error}); "
            "download or save the adapter again."
        ) from error


def fetch_weights(name_or_path: str | os.PathLike, config: PeftConfig, **kwargs) -> str:
    """Returns the path of the weights of an adapter of this package, after a look at the names of its tensors.

    Raises:
        OSError: If they cannot be fetched.
        ValueError: If there are only pickled weights, or the file is damaged or not of such an adapter.
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
        with safe_open(path, framework="pt") as file:  # reads the header only, and compares it with the file's length
            names = list(file.keys())
    except SafetensorError as error:
        what = foreign_content(path)
        reason = (
            f"no file of safetensors: {what}" if what else f"damaged ({error}); download or save the adapter again"
        )
        raise ValueError(f"{path} is {reason}.") from error
    modules = [f".{name}." for name in config.modules_to_save or ()]
    pattern = ADAPTER_TENSORS[config.peft_type]
    for name in names:
        if not pattern.search(name) and not any(module in f".{name}" for module in modules):
            raise ValueError(
                f"The adapter's weights hold {name!r}, which is no part of such an adapter and would change the "
                "frozen model; the file is damaged, or not to be trusted."
            )
    return path


def check_adapter(name_or_path: str | os.PathLike | None, **kwargs) -> PeftConfig | None:
    """Checks an adapter of this package that transformers is about to load, which itself only compares shapes.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or Hub id, or `None`.
        kwargs:
            The arguments of transformers' `load_adapter`, of which those about the Hub are used.

    Returns:
        `PeftConfig`: The configuration, or `None` if there is no adapter.

    Raises:
        ValueError: If it is an adapter of this package that is damaged, or would change the frozen model.
    """
    if name_or_path is None:  # the tensors are in memory
        return None
    options = {
        **kwargs,
        **getattr(kwargs.get("load_config"), "download_kwargs", {}),
        **(kwargs.get("adapter_kwargs") or {}),
    }
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    path = fetch(name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    config = None if path is None else read_config(path)
    if config is not None and config.peft_type in ADAPTER_TENSORS:
        check_values(load_file(fetch_weights(name_or_path, config, **hub)))
    return config


def holds_model(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a whole model, in the format of transformers or of open_clip."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", OPEN_CLIP_CONFIG))


def check_adapter_folder(name_or_path: str | os.PathLike | None) -> None:
    """Checks a folder that holds an adapter, which has to name its base model unless that is beside it."""
    if name_or_path is None or not os.path.isfile(os.path.join(name_or_path, CONFIG_NAME)):
        return
    config = check_adapter(name_or_path)
    if not config.base_model_name_or_path and not holds_model(name_or_path):
        raise ValueError(f"The adapter {str(name_or_path)!r} does not name its base model.")


def check_tensors(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], config: PeftConfig, adapter_name: str
) -> None:
    """Raises `ValueError` unless the tensors are those that model and configuration ask for, with valid values.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The tensors of a file, by their names in the model.
        expected (`Mapping[str, torch.Tensor]`):
            Those of the adapter in the model.
        config (`PeftConfig`):
            The configuration of the adapter.
        adapter_name (`str`):
            The name of the adapter in the model.
    """
    for key, parameter in expected.items():
        if key not in state_dict:
            raise ValueError(
                f"The adapter's weights hold no {key!r}, only {sorted(state_dict)}; the file is damaged or belongs to "
                "another method."
            )
        shape, wanted = tuple(state_dict[key].shape), tuple(parameter.shape)
        if shape != wanted:
            raise ValueError(
                f"The adapter's {key!r} has shape {shape}, but this model and the adapter's configuration ask for "
                f"{wanted} (num_virtual_tokens, class_names, hidden sizes). The adapter was trained on "
                f"{config.base_model_name_or_path!r}; load that base model."
            )
    check_values(state_dict)
    for key in state_dict:
        if key not in expected and f".modules_to_save.{adapter_name}." not in key:
            raise ValueError(
                f"The adapter's weights hold {key!r}, which its configuration does not ask for and which could change "
                "the frozen model; the file is damaged, or not to be trusted."
            )


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` for a tensor that is not of floating point numbers, or holds NaN, Inf or absurd values.

    Class indices are integers of 64 bits.
    """
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == INDEX and tensor.dtype == torch.int64:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"The adapter's {name!r} is of {tensor.dtype}, not of floating point numbers.")
        if tensor.is_meta:
            raise ValueError(
                f"The adapter's {name!r} has no values: transformers' load_adapter puts them on the meta device if "
                "accelerate has offloaded the model. Load it with PeftModel.from_pretrained, or before offloading."
            )
        if not (tensor.detach().float().abs() <= LARGEST).all():
            raise ValueError(
                f"The adapter's {name!r} holds NaN, Inf or numbers beyond {LARGEST:g}: its training diverged, or the "
                "file is damaged. Take an earlier version of it, or train it again."
            )
