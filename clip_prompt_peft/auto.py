"""Auto classes, which load the classifier for a checkpoint, an adapter, or a model in memory."""

from __future__ import annotations

import os

from peft.utils import CONFIG_NAME
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .evaluation.model_card import is_hub_id
from .families import classifier_class
from .modeling import PromptClassificationMixin
from .peft_model import PeftModelForPromptClassification
from .tuner import ClassifierAdapterConfig
from .tuner.files import fetch, fetch_weights, read_config
from .tuner.hub import HubSettings, check_revision, load_config, locate, pin_base_model


class FromPretrainedOnly:
    """The base class of the auto classes, which cannot be instantiated."""

    def __init__(self, *args, **kwargs):
        raise EnvironmentError(  # noqa: UP024, the type that transformers' auto classes raise
            f"{type(self).__name__} cannot be instantiated; use {type(self).__name__}.from_pretrained(name_or_path)."
        )


class AutoModelForPromptClassification(FromPretrainedOnly):
    """
    Creates the classifier for a checkpoint, whose class is chosen by the checkpoint's config.

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
        Loads the classifier of a checkpoint.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A checkpoint of a supported family in the format of transformers or of open_clip, a saved classifier,
                or a prompt adapter, as a folder or Hub id.
            model_args, kwargs:
                The arguments of the classifier's own `from_pretrained` (`class_names`, `prompt_template`, ...).

        Raises:
            OSError: If there is no such folder or repository, or no config in it.
            ValueError: If the family is not supported. The message lists those that are.
        """
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            name, base, adapter = locate(pretrained_model_name_or_path, kwargs)
            config = load_config(name, base)
            kwargs["revision"] = (adapter or base).revision  # the commit, from here on
        classifier = classifier_class(config)
        return classifier.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_base(cls, model: PreTrainedModel, *args, **kwargs) -> PromptClassificationMixin:
        """Creates a classifier from a model in memory, see [`~PromptClassificationMixin.from_base`].

        Raises:
            ValueError: If the family is not supported. The message lists those that are.
        """
        return classifier_class(model.config).from_base(model, *args, **kwargs)


class AutoPeftModelForPromptClassification(FromPretrainedOnly):
    """
    Creates a classifier with base model, class names and prompts from the folder or Hub id of an adapter.

    It takes the place of `AutoPeftModel` in peft, which does not import model classes of other packages.

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
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        low_cpu_mem_usage: bool = False,
        base_model_revision: str | None = None,
        **base_model_kwargs,
    ) -> PeftModelForPromptClassification:
        """
        Loads an adapter and its base model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                The folder or Hub id of the adapter.
            adapter_name (`str`, *optional*, defaults to `"default"`):
                The name of the adapter in the model.
            is_trainable (`bool`, *optional*, defaults to `False`):
                Whether the adapter is trained further.
            base_model_name_or_path (`str`, *optional*):
                The base model to use instead of the one that the adapter names, for instance if that is a path on
                another machine.
            tokenizer (*optional*, defaults to that of the base model):
                The tokenizer.
            revision, subfolder (`str`, *optional*):
                The revision of the adapter on the Hub, and its folder in the repository. The base model has its own,
                which the adapter names.
            token (`str` or `bool`, *optional*):
                The token for the Hub.
            cache_dir (`str`, *optional*):
                The folder for downloads.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
                Whether to create the adapter on the meta device before its weights are loaded.
            base_model_revision (`str`, *optional*):
                The revision of the base model to use instead of the one that the adapter names.
            base_model_kwargs:
                Further arguments of the base model's `from_pretrained` (`dtype`, `device_map`, ...). Those about the
                Hub (`local_files_only`, `force_download`, `proxies`) hold for the adapter, too.

        Raises:
            OSError: If the folder or repository does not exist, cannot be accessed, or holds no adapter, if the base
                model or the revision that the adapter names is gone, or if the Hub fails.
            TypeError: If `class_names` or `prompt_template` are given, which the adapter brings.
            ValueError: If the adapter is of another method, its weights are pickled or damaged, its base model is not
                named or cannot be found, or the family of the base model is not supported.
        """
        for name in sorted({"class_names", "prompt_template"} & base_model_kwargs.keys()):
            raise TypeError(
                f"{name} belongs to the adapter and cannot be given; for other classes, call "
                "model.set_class_names([...]) on the loaded model."
            )
        own = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        source = HubSettings.of_arguments({**base_model_kwargs, **own})
        source = source.pinned(pretrained_model_name_or_path, CONFIG_NAME)
        # The weights have to be of the same commit as the configuration, even if someone pushes in the meantime.
        config_file = fetch(pretrained_model_name_or_path, CONFIG_NAME, **source.arguments)
        config = read_config(config_file)
        if not isinstance(config, ClassifierAdapterConfig):
            raise ValueError(
                f"{config_file} is of type {config.peft_type}, not of CLIP prompt tuning or a class head, and names "
                "no classes. If it was trained in a classifier, load it with AutoModelForPromptClassification."
                "from_pretrained(..., class_names=[...]), otherwise with peft's classes."
            )
        folder = os.path.dirname(fetch_weights(pretrained_model_name_or_path, config, **source.arguments))
        if config.problem_type is not None:
            base_model_kwargs.setdefault("problem_type", config.problem_type)
        base = base_model_name_or_path or _base_model_of(config, pretrained_model_name_or_path)
        check_revision(base, base_model_revision)
        of_base = source.at(base_model_revision)
        if base == config.base_model_name_or_path:
            of_base = of_base.at(base_model_revision or config.revision, config.base_model_subfolder)
            of_base = pin_base_model(base, of_base, pretrained_model_name_or_path)
        model = AutoModelForPromptClassification.from_pretrained(
            base,
            class_names=config.class_names,
            prompt_template=config.prompt_template,
            tokenizer=tokenizer,
            revision=of_base.revision,
            subfolder=of_base.subfolder,
            token=token,
            cache_dir=cache_dir,
            **base_model_kwargs,
        )
        return PeftModelForPromptClassification.from_pretrained(
            model, folder, adapter_name, is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )


def _base_model_of(config: ClassifierAdapterConfig, adapter: str | os.PathLike) -> str:
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {str(adapter)!r} does not name its base model; pass base_model_name_or_path.")
    if not os.path.isdir(base) and not is_hub_id(base):
        raise ValueError(
            f"The adapter {str(adapter)!r} names the base model {base!r}, which is no folder of this machine and no "
            "Hub id; pass base_model_name_or_path."
        )
    return base
