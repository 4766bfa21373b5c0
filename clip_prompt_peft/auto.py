"""From an adapter alone to a whole classifier."""

from __future__ import annotations

import json
import os

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file, extract_commit_hash

from .auto_model import AutoModelForPromptClassification
from .model_card import is_hub_id
from .peft_model import PeftModelForPromptClassification
from .tuner import CLIPPromptTuningConfig


class AutoPeftModelForPromptClassification:
    """
    Builds base model, class names and prompts from an adapter's folder or Hub id.

    peft's own `AutoPeftModel` refuses to import model classes of other packages, hence this class.

    Example:

    ```py
    >>> from clip_prompt_peft import AutoPeftModelForPromptClassification

    >>> model = AutoPeftModelForPromptClassification.from_pretrained("me/pets-prompts")
    >>> model(pixel_values=pixel_values).logits  # (B, C)
    ```
    """

    def __init__(self, *args, **kwargs):
        raise EnvironmentError(  # noqa: UP024, the type that transformers' auto classes raise
            f"{type(self).__name__} is made to be used through {type(self).__name__}.from_pretrained(name_or_path)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        base_model_name_or_path: str | None = None,
        tokenizer=None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        low_cpu_mem_usage: bool = False,
        **base_model_kwargs,
    ) -> PeftModelForPromptClassification:
        """
        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter.
            adapter_name: name to give it.
            is_trainable: whether to go on training it.
            base_model_name_or_path: base model to use instead of the one that the adapter names, for instance when
                that was a path on another machine.
            tokenizer: by default the base model's.
            revision, subfolder, token, cache_dir: where the adapter is, as for `PeftModel.from_pretrained`.
            low_cpu_mem_usage: as for `PeftModel.from_pretrained`.
            base_model_kwargs: for the base model's `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            OSError: no such folder or repository, no access to it, no adapter in it, or a Hub that fails.
            ValueError: an adapter of another method; a base model of a family that is not supported; weights that are
                a pickle or damaged; an adapter that names no base model, or one that is not on this machine.
        """
        adapter = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        adapter = {key: value for key, value in adapter.items() if value is not None}
        config_file = _fetch(pretrained_model_name_or_path, CONFIG_NAME, **adapter)
        config = _read_config(config_file)
        commit = extract_commit_hash(config_file, None)
        if commit is not None:
            adapter["revision"] = commit  # so that the weights are of the same commit, whoever pushes meanwhile
        folder = os.path.dirname(_fetch_weights(pretrained_model_name_or_path, adapter))
        model = AutoModelForPromptClassification.from_pretrained(
            base_model_name_or_path or _base_model_of(config, pretrained_model_name_or_path),
            class_names=config.class_names,
            prompt_template=config.prompt_template,
            tokenizer=tokenizer,
            revision=config.revision if base_model_name_or_path is None else None,
            token=token,
            cache_dir=cache_dir,
            **base_model_kwargs,
        )
        return PeftModelForPromptClassification.from_pretrained(
            model,
            folder,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )


def _fetch(name_or_path: str | os.PathLike, filename: str, **kwargs) -> str | None:
    try:
        return cached_file(name_or_path, filename, **kwargs)
    except OSError:
        raise
    except Exception as error:  # of the HTTP library: a connection that breaks off
        raise OSError(f"{filename} of {str(name_or_path)!r} could not be downloaded: {error}") from error


def _read_config(path: str) -> CLIPPromptTuningConfig:
    try:
        config = PeftConfig.from_pretrained(os.path.dirname(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); download or save the adapter again.") from error
    if not isinstance(config, CLIPPromptTuningConfig):
        raise ValueError(
            f"{path} is of an adapter of type {config.peft_type}, not of CLIP prompt tuning; load it with peft's own "
            "classes."
        )
    return config


def _fetch_weights(name_or_path: str | os.PathLike, adapter: dict) -> str:
    path = _fetch(name_or_path, WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **adapter)
    if path is None:  # peft would go on to look for adapter_model.bin, a pickle
        raise ValueError(
            f"{str(name_or_path)!r} holds no {WEIGHTS_NAME}. Weights in other formats are pickles, which can run code "
            "when they are opened, and are not loaded; save the adapter again with save_pretrained (safetensors)."
        )
    try:
        with safe_open(path, framework="pt"):  # reads the header, which tells the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); download or save the adapter again.") from error
    return path


def _base_model_of(config: CLIPPromptTuningConfig, adapter: str | os.PathLike) -> str:
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {str(adapter)!r} does not name its base model; pass base_model_name_or_path.")
    if not os.path.isdir(base) and not is_hub_id(base):
        raise ValueError(
            f"The adapter {str(adapter)!r} names the base model {base!r}, which is no folder of this machine and "
            "cannot be a Hub id; pass base_model_name_or_path."
        )
    return base
