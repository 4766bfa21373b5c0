"""The adapters that a user means by a folder or a Hub id, and loading one of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers import BaseImageProcessor

from .. import AutoPeftModelForPromptClassification, PeftModelForPromptClassification
from ..evaluation.model_card import is_hub_id
from ..evaluation.tables import listed
from ..training.checkpoints import last_whole_checkpoint
from ..tuner import ClassifierAdapterConfig
from ..tuner.files import adapter_folders, holds_model
from ..tuner.hub import HubSettings, check_revision, load_image_processor, pin_base_model
from .checks import check_base_model
from .common import silence_libraries, use_one_thread_if_tiny


# Endings of files; a Hub id may have a dot, too, as in "user/pets-v1.5".
FILE_ENDINGS = (
    ".safetensors",
    ".bin",
    ".json",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    ".html",
)
NUM_SHOWN = 8  # names of a folder's content


def find_adapters(name_or_path: str) -> dict[str, str]:
    """
    Returns the folders or the Hub id of the adapters that a user means, by name.

    Args:
        name_or_path (`str`):
            The folder of an adapter, a folder whose sub-folders are adapters, such as the output folder of the command
            `train`, or a Hub id. Nothing that looks like a path is taken for a Hub id.

    Raises:
        ValueError: If there are no adapters. The message says what is there instead.
    """
    path = os.path.expanduser(name_or_path)
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, CONFIG_NAME)):
            return {os.path.basename(os.path.abspath(path)): path}
        found = adapter_folders(path)
        if not found:
            raise ValueError(f"{name_or_path!r} is no folder of an adapter: {_what_is_in(path)}")
        return {os.path.basename(folder): folder for folder in found}
    if os.path.exists(path):
        raise ValueError(
            f"{name_or_path!r} is a file, but an adapter is a folder with the file {CONFIG_NAME}. It is named first."
        )
    if _is_meant_as_path(name_or_path):
        raise ValueError(f"There is no folder {name_or_path!r}; {_what_is_above(path)}")
    return {name_or_path.rpartition("/")[2]: name_or_path}


def find_adapter(name_or_path: str) -> str:
    """Returns the folder or Hub id of one adapter. If there are several, it is the first, and the user is told so.

    Raises:
        ValueError: If there are no adapters, see [`find_adapters`].
    """
    (first, path), *others = find_adapters(name_or_path).items()
    if others:
        example = os.path.join(name_or_path, others[0][0])
        print(
            f"{name_or_path!r} holds several adapters. {first} is used, and {listed([name for name, _ in others])} "
            f"{'is' if len(others) == 1 else 'are'} not; name one to use it, such as {example}.",
            file=sys.stderr,
        )
    return path


def base_model_of(
    adapters: Mapping[str, str], chosen: str | None = None, revision: str | None = None
) -> tuple[str, HubSettings]:
    """Returns the base model that all of the adapters name, and its revision and subfolder as settings.

    Args:
        adapters (`Mapping[str, str]`):
            The folder or Hub id of each adapter by name.
        chosen (`str`, *optional*):
            The base model that the user chose. Its revision is the one that the adapters name, if they agree on one.
        revision (`str`, *optional*):
            The revision that the user chose.

    Raises:
        ValueError: If they name several, or none, and none is chosen, or if the chosen one is no model.
        OSError: If the base model that they name, or its revision, cannot be accessed.
    """
    if chosen is not None:
        check_base_model(chosen, "--base")
    configs = {name: PeftConfig.from_pretrained(path) for name, path in adapters.items()}
    places = {
        name: (config.base_model_name_or_path, revision or config.revision, config.base_model_subfolder or None)
        for name, config in configs.items()
        if isinstance(config, ClassifierAdapterConfig)
    }
    found = {place for place in places.values() if place[0] is not None and chosen in (None, place[0])}
    for base in (chosen,) if chosen is not None else (place[0] for place in found):
        check_revision(base, revision)
    if chosen is not None and len(found) != 1:
        return chosen, HubSettings().at(revision)
    if len(found) != 1 or None in {name for name, _, _ in places.values()}:
        named = "; ".join(f"{name}: {_shown(*place)}" for name, place in places.items())
        raise ValueError(
            f"The adapters do not name one base model ({named or 'no adapters with classes'}). Choose it with --base."
        )
    ((name, revision, subfolder),) = found
    return name, pin_base_model(name, HubSettings().at(revision, subfolder), next(iter(adapters.values())))


def _shown(base: str | None, revision: str | None, subfolder: str | None) -> str:
    details = {"revision": revision, "subfolder": subfolder}
    return ", ".join([base or "none", *(f"{name} {value}" for name, value in details.items() if value)])


def _is_meant_as_path(name: str) -> bool:
    """Returns whether a name that does not exist is meant as a path. A Hub id of an adapter is `user/name`."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") != 1
        or name.endswith(("/", *FILE_ENDINGS))
        or os.path.isdir(name.partition("/")[0])
        or not is_hub_id(name)
    )


def _what_is_in(folder: str) -> str:
    """Says what lies in a folder that holds no adapter, and what was expected."""
    if checkpoint := last_whole_checkpoint(folder):
        return (
            f"its training was interrupted. Continue it (--resume_from_checkpoint true), or use {checkpoint!r}, the "
            "last checkpoint."
        )
    below = sorted({str(file.parent.parent) for file in Path(folder).glob(f"*/*/{CONFIG_NAME}")})
    below = [parent for parent in below if adapter_folders(parent)]
    if below:
        return f"adapters lie deeper, in {listed([repr(parent) for parent in below[:NUM_SHOWN]])}; name one of these."
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
    model = " That is a whole model and no adapter." if holds_model(folder) else ""
    return f"it holds {shown or 'nothing'}.{model} Expected {CONFIG_NAME}, or sub-folders that hold one."


def _what_is_above(path: str) -> str:
    """Says what lies beside a folder that does not exist."""
    parent = os.path.dirname(os.path.abspath(path))
    hub = "Adapters on the Hub are named USER/NAME."
    if not os.path.isdir(parent):
        return f"{parent!r} does not exist, either. {hub}"
    folders = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith("."))
    shown = ", ".join(folders[:NUM_SHOWN]) + (", ..." if len(folders) > NUM_SHOWN else "")
    return f"in {parent!r} there {'is' if len(folders) == 1 else 'are'} {shown or 'no folders'}. {hub}"


def load_adapter(
    adapter: str, args: argparse.Namespace
) -> tuple[PeftModelForPromptClassification, BaseImageProcessor]:
    """Loads the classifier of an adapter in evaluation mode, and the image processor of its base model.

    Args:
        adapter (`str`):
            The folder or Hub id of the adapter, as [`find_adapter`] returns it.
        args (`argparse.Namespace`):
            The arguments of a command that takes one adapter.

    Raises:
        ValueError: If the adapter is damaged or does not fit the base model.
        OSError: If the adapter or its base model is not found.
    """
    if args.base is not None:
        check_base_model(args.base, "--base")
    silence_libraries()  # the bar of loading the weights, but for what comes after it
    model = AutoPeftModelForPromptClassification.from_pretrained(
        adapter, base_model_name_or_path=args.base, base_model_revision=args.base_revision
    )
    silence_libraries(progress_bars=True)
    classifier = model.get_base_model()
    use_one_thread_if_tiny(classifier.name_or_path)
    return model.eval().to(args.device), load_image_processor(classifier)
