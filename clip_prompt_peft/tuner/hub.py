"""Where the files of a model came from, and with what: the settings for all that is loaded later by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from huggingface_hub.errors import RevisionNotFoundError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedConfig
from transformers.utils import extract_commit_hash, find_adapter_config_file

from ..open_clip import CONFIG_FILE, find_checkpoint
from .files import fetch, holds_model, read_config


MODEL_CONFIG = "config.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSettings:
    """
    The arguments of `from_pretrained` about the Hub with which a model was loaded.

    A model keeps them in its attribute `hub_settings`, never in its config. Copies of a model share them. Pickles hold
    neither the token nor the proxies, which may contain a password; both are left out of the `repr`, too.

    Args:
        revision (`str`, *optional*):
            The branch, tag or commit. A model that was loaded from the Hub has a commit.
        subfolder (`str`, *optional*, defaults to `""`):
            The folder in the repository, or below the local folder.
        token (`str` or `bool`, *optional*):
            The token for the Hub; `False` for none.
        cache_dir (`str` or `os.PathLike`, *optional*):
            The folder for downloads.
        local_files_only (`bool`, *optional*, defaults to `False`):
            Whether to use only what has been downloaded before.
        force_download (`bool`, *optional*, defaults to `False`):
            Whether to download files again.
        proxies (`dict[str, str]`, *optional*):
            The proxies by protocol.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False
    proxies: dict[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of_arguments(cls, arguments: Mapping) -> HubSettings:
        """Returns the settings among the arguments of a `from_pretrained`."""
        names = [setting.name for setting in fields(cls)]
        return cls(**{name: arguments[name] for name in names if arguments.get(name) is not None})

    @property
    def arguments(self) -> dict:
        """The arguments of `from_pretrained` that differ from its defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def at(self, revision: str | None, subfolder: str | None = None) -> HubSettings:
        """Returns the settings for another repository, or another revision of it."""
        return replace(self, revision=revision, subfolder=subfolder or "")

    def pinned(self, name_or_path: str | os.PathLike | None, filename: str = MODEL_CONFIG) -> HubSettings:
        """Returns the settings with the revision resolved to the commit that it is now.

        All files that are loaded with them are of one state of the repository. Local folders have no revision.

        Args:
            name_or_path (`str` or `os.PathLike`, *optional*):
                The folder or Hub id.
            filename (`str`, *optional*, defaults to `"config.json"`):
                A file of the repository.

        Raises:
            OSError: If the repository cannot be accessed, or has no such file.
        """
        if name_or_path is None or os.path.exists(name_or_path):
            return self
        path = None
        if filename == MODEL_CONFIG:
            optional = {**self.arguments, "_raise_exceptions_for_missing_entries": False}
            path = fetch(name_or_path, filename, **optional) or fetch(name_or_path, CONFIG_FILE, **optional)
        path = path or fetch(name_or_path, filename, **self.arguments)
        return replace(self, revision=extract_commit_hash(path, None) or self.revision)

    def __copy__(self) -> HubSettings:
        return self

    def __deepcopy__(self, memo: dict) -> HubSettings:
        return self

    def __reduce__(self):
        return type(self), (self.revision, self.subfolder, None, self.cache_dir, self.local_files_only)


def hub_settings_of(model: nn.Module) -> HubSettings:
    """Returns the settings for files beside a model's weights: its tokenizer, its image processor.

    transformers keeps none of them on its own models. For these, the user's defaults hold.
    """
    return getattr(model, "hub_settings", None) or HubSettings()


def load_config(name_or_path: str | os.PathLike, hub: HubSettings) -> PreTrainedConfig:
    """Loads the configuration of a model, also of one of open_clip, as that of the equal model in transformers.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is damaged, or of a model of open_clip that transformers cannot express.
    """
    if checkpoint := find_checkpoint(name_or_path, **hub.arguments):
        return checkpoint.config
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub.arguments)


def load_tokenizer(name_or_path: str, hub: HubSettings, remedy: str):
    """Loads the tokenizer of a model.

    Args:
        name_or_path (`str`):
            The folder or Hub id.
        hub (`HubSettings`):
            Where, and with what, the model came from.
        remedy (`str`):
            What the user can do, for error messages.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If there is none beside the model.
    """
    place = f"{name_or_path!r}" + (f", subfolder {hub.subfolder!r}" if hub.subfolder else "")
    if hub.revision is not None:
        place += f", revision {hub.revision!r}"
    try:
        checkpoint = find_checkpoint(name_or_path, **hub.arguments)
        if checkpoint is not None:
            return checkpoint.tokenizer()
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub.arguments)
    except OSError as error:
        raise OSError(f"The tokenizer of {place} could not be loaded: {error}\n{remedy}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there are no files
        raise ValueError(f"There are no files of a tokenizer in {place}. {remedy}")
    return tokenizer


def load_image_processor(model) -> BaseImageProcessor:
    """
    Loads the image processor of a model from where, and with what, the model was loaded.

    It knows the configuration of open_clip, too, which `AutoImageProcessor` does not.

    Args:
        model (`PreTrainedModel`):
            A classifier, or a model of a family.

    Returns:
        `BaseImageProcessor`: The image processor.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If the model has no `name_or_path`.

    Example:

    ```py
    >>> from clip_prompt_peft import load_image_processor

    >>> image_processor = load_image_processor(model)
    >>> image_processor(images, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)
    ```
    """
    if not model.name_or_path:
        raise ValueError("The model has no name_or_path to load an image processor from; pass image_processor=...")
    hub = hub_settings_of(model).arguments
    if checkpoint := find_checkpoint(model.name_or_path, **hub):
        return checkpoint.image_processor()
    return AutoImageProcessor.from_pretrained(model.name_or_path, trust_remote_code=False, **hub)


def locate(
    name_or_path: str | os.PathLike | None, arguments: Mapping
) -> tuple[str | os.PathLike | None, HubSettings, HubSettings | None]:
    """Finds the base model of a checkpoint or an adapter, and resolves the revisions of both.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*):
            A checkpoint or an adapter, as a folder or Hub id.
        arguments (`Mapping`):
            The arguments of `from_pretrained`.

    Returns:
        `tuple`: Folder or Hub id of the base model, the settings to load it with, and those to load the adapter with;
        `None` if it is a checkpoint.

    Raises:
        OSError: If the base model cannot be accessed.
        ValueError: If the adapter is damaged, or does not name its base model.
    """
    hub = HubSettings.of_arguments(arguments)
    if name_or_path is None:
        return None, hub, None
    of_adapter = {**hub.arguments, **(arguments.get("adapter_kwargs") or {})}
    adapter = HubSettings.of_arguments(of_adapter)
    if getattr(adapter.revision, "initial", adapter.revision) is None:
        # In transformers.pipeline nobody asked for a revision: the commit is the base model's, not the adapter's.
        adapter = adapter.at(None, adapter.subfolder)
    path = find_adapter_config_file(str(name_or_path), **adapter.arguments)
    if path is None or holds_model(name_or_path):  # a model with its adapter beside it
        return name_or_path, hub.pinned(name_or_path), None
    config = read_config(path)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {str(name_or_path)!r} does not name its base model; load that one first.")
    of_base = hub.at(config.revision, getattr(config, "base_model_subfolder", None))
    of_base = pin_base_model(base, of_base, name_or_path)
    return base, of_base, replace(adapter, revision=extract_commit_hash(path, None) or adapter.revision)


def check_revision(base: str, revision: str | None) -> None:
    """Raises `ValueError` if a revision is given for a base model that is a folder, which has none."""
    if revision is not None and os.path.isdir(base):
        raise ValueError(
            f"The base model {base!r} is a folder, which has no revision {revision!r}; leave the revision out, or "
            "name the Hub id of the base model."
        )


def pin_base_model(base: str, hub: HubSettings, adapter: str | os.PathLike) -> HubSettings:
    """Returns the settings of the base model that an adapter names, with its revision resolved to a commit.

    Args:
        base (`str`):
            The folder or Hub id of the base model.
        hub (`HubSettings`):
            The revision and subfolder that the adapter names, and with what they are loaded.
        adapter (`str` or `os.PathLike`):
            The adapter, for error messages.

    Raises:
        OSError: If the base model, or this revision of it, cannot be accessed. The message says what to do.
    """
    try:
        return hub.pinned(base)
    except OSError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            reason = "The repository has no such revision (any more); it may have been removed or renamed."
        else:
            reason = str(error)
        revision = f" at revision {hub.revision!r}" if hub.revision else ""
        raise OSError(
            f"The adapter {str(adapter)!r} was trained on the base model {base!r}{revision}, which cannot be loaded. "
            f"{reason} To take another revision or a copy of it, pass base_model_revision (such as 'main') or "
            "base_model_name_or_path to AutoPeftModelForPromptClassification.from_pretrained, or --base_revision or "
            "--base to a command; you will be warned if its weights are others."
        ) from error
