"""From a checkpoint, or a model in memory, to the classifier of its family."""

from __future__ import annotations

import os

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .adapter_files import check_folder, read_config
from .classifier import CLIPForPromptClassification
from .families import (
    AltCLIPForPromptClassification,
    ChineseCLIPForPromptClassification,
    MetaClip2ForPromptClassification,
    Siglip2ForPromptClassification,
    SiglipForPromptClassification,
)
from .prompt_classification import PromptClassificationMixin


CLASSIFIERS: tuple[type[PromptClassificationMixin], ...] = (
    CLIPForPromptClassification,
    MetaClip2ForPromptClassification,
    SiglipForPromptClassification,
    Siglip2ForPromptClassification,
    ChineseCLIPForPromptClassification,
    AltCLIPForPromptClassification,
)
HUB_SETTINGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class FromPretrainedOnly:
    """What auto classes have in common: there are no objects of them."""

    def __init__(self, *args, **kwargs):
        raise EnvironmentError(  # noqa: UP024, the type that transformers' auto classes raise
            f"{type(self).__name__} is made to be used through {type(self).__name__}.from_pretrained(name_or_path)."
        )


class AutoModelForPromptClassification(FromPretrainedOnly):
    """
    Picks the classifier of a checkpoint's family by its config.

    Example:

    ```py
    >>> from clip_prompt_peft import AutoModelForPromptClassification

    >>> model = AutoModelForPromptClassification.from_pretrained(
    ...     "google/siglip-base-patch16-224", class_names=["cat", "dog"]
    ... )
    >>> type(model).__name__
    'SiglipForPromptClassification'
    ```
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, **kwargs
    ) -> PromptClassificationMixin:
        """
        Args:
            pretrained_model_name_or_path: checkpoint of a supported family, saved classifier, or prompt adapter.
            model_args, kwargs: for the classifier's own `from_pretrained` (`class_names`, `prompt_template`, ...).

        Raises:
            OSError: no such folder or repository, or no config in it.
            ValueError: a model of a family that is not supported; the message lists those that are.
        """
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            hub = {name: kwargs[name] for name in HUB_SETTINGS if kwargs.get(name) is not None}
            config = _config_of(pretrained_model_name_or_path, hub)
        classifier = classifier_class(config)
        return classifier.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_base(cls, model: PreTrainedModel, *args, **kwargs) -> PromptClassificationMixin:
        """A classifier around a model in memory, see [`~PromptClassificationMixin.from_base`].

        Raises:
            ValueError: a model of a family that is not supported.
        """
        return classifier_class(model.config).from_base(model, *args, **kwargs)


def classifier_class(config: PreTrainedConfig) -> type[PromptClassificationMixin]:
    """The classifier for models of this config; `ValueError` with the supported families if there is none."""
    for classifier in CLASSIFIERS:
        if type(config) is classifier.config_class:
            return classifier
    supported = ", ".join(f"{one.config_class.model_type} ({one.base_class.__name__})" for one in CLASSIFIERS)
    raise ValueError(
        f"A {type(config).__name__} (model type {config.model_type!r}) is not of a family that is known to have a "
        f"text and an image tower with one embedding space. Supported are: {supported}. Checkpoints of open_clip work "
        "through their weights in transformers' format."
    )


def _config_of(name_or_path: str | os.PathLike, hub: dict) -> PreTrainedConfig:
    check_folder(name_or_path)  # of an adapter
    adapter = find_adapter_config_file(str(name_or_path), **hub)
    if adapter is not None:
        base = read_config(adapter).base_model_name_or_path
        if not base:
            raise ValueError(f"The adapter {str(name_or_path)!r} does not name its base model; load that one first.")
        hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
        return AutoConfig.from_pretrained(base, trust_remote_code=False, **hub)
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub)
