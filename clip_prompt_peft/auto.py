"""From an adapter alone to a whole classifier."""

from __future__ import annotations

import os

from peft.utils import CONFIG_NAME
from transformers.utils import extract_commit_hash

from .adapter_files import fetch, fetch_weights, read_config
from .auto_model import AutoModelForPromptClassification, FromPretrainedOnly
from .model_card import is_hub_id
from .peft_model import PeftModelForPromptClassification
from .tuner import CLIPPromptTuningConfig


class AutoPeftModelForPromptClassification(FromPretrainedOnly):
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
        config_file = fetch(pretrained_model_name_or_path, CONFIG_NAME, **adapter)
        config = _read_config(config_file)
        commit = extract_commit_hash(config_file, None)
        if commit is not None:
            adapter["revision"] = commit  # so that the weights are of the same commit, whoever pushes meanwhile
        if config.problem_type is not None:
            base_model_kwargs.setdefault("problem_type", config.problem_type)
        folder = os.path.dirname(fetch_weights(pretrained_model_name_or_path, config, **adapter))
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


def _read_config(path: str) -> CLIPPromptTuningConfig:
    config = read_config(path)
    if not isinstance(config, CLIPPromptTuningConfig):
        raise ValueError(
            f"{path} is of an adapter of type {config.peft_type}, not of CLIP prompt tuning; load it with peft's own "
            "classes."
        )
    return config


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
