"""Loading, saving and converting classifiers: the part of the mixin that reads and writes files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .assets import PIPELINE_FILE, custom_pipelines
from .file_contents import foreign_content
from .open_clip import OpenClipCheckpoint, find_checkpoint
from .templates import check_class_names, check_template, name_labels
from .towers import with_modules_of
from .tuner.files import check_adapter, check_adapter_folder
from .tuner.hub import HubSettings, hub_settings_of, locate
from .tuner.quantized import keep_trainable


logger = logging.getLogger(__name__)
HUB_ARGUMENTS = {setting.name for setting in fields(HubSettings)}
PUSH_SETTINGS = ("commit_message", "create_pr", "max_shard_size", "private", "token")


# The mixin goes in front of a model of transformers, which checkers of types must know: `model.to("cuda")`.
if TYPE_CHECKING:
    ModelBase = PreTrainedModel
else:
    ModelBase = object


class PretrainedClassifierMixin(ModelBase):
    """
    What a classifier does with checkpoints. [`~modeling.PromptClassificationMixin`] adds classes and prompts to it.

    **Attributes**:
        - **base_class** (`type`): The model of the family.
        - **weight_names** (`dict[str, str]`, *optional*): Patterns of tensor names in checkpoints, and their names
          here. transformers renames tensors only for its own classes.
    """

    base_class: type[PreTrainedModel]
    weight_names: dict[str, str] | None = None
    names_were_given = False  # whether the model has class names that an adapter could take the place of

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> Self:
        """
        Loads a checkpoint as the family's own `from_pretrained` does, with class names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A checkpoint of the family in the format of transformers or of open_clip, a saved classifier, or a
                prompt adapter, as a folder or Hub id.
            class_names (`Sequence[str]`, *optional*):
                C names. By default those saved with the checkpoint or adapter.
            prompt_template (`str`, *optional*):
                A text with one `{}`. By default the saved one, or `default_template`.
            tokenizer (*optional*):
                The tokenizer. By default the one beside the checkpoint.
            model_args, kwargs:
                The arguments of the family's own `from_pretrained`. Those about the Hub are kept in
                `model.hub_settings` for what is loaded later. An adapter names the revision of its base model itself.

        Raises:
            ValueError: If names or template are not valid (before anything is loaded), or the checkpoint is of another
                kind of model.
        """
        if class_names is not None:
            class_names = check_class_names(class_names)
        if prompt_template is not None:
            check_template(prompt_template)
        check_adapter_folder(pretrained_model_name_or_path)
        with_info = kwargs.pop("output_loading_info", False)
        if cls.weight_names is not None:
            kwargs.setdefault("key_mapping", cls.weight_names)
        base_name, base, adapter = locate(pretrained_model_name_or_path, kwargs)
        kwargs.update(revision=base.revision, subfolder=base.subfolder)
        if adapter is not None:
            own = {"revision": adapter.revision, "subfolder": adapter.subfolder}
            kwargs["adapter_kwargs"] = {**own, **(kwargs.get("adapter_kwargs") or {})}
        own_name = getattr(kwargs.get("config"), "name_or_path", None)
        checkpoint = None if base_name is None else find_checkpoint(base_name, **base.arguments)
        try:
            if checkpoint is not None:
                model, info = cls._of_open_clip(checkpoint, pretrained_model_name_or_path, *model_args, **kwargs)
            else:
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            for file in sorted(Path(pretrained_model_name_or_path).rglob("*.safetensors")):
                if what := foreign_content(file):
                    raise ValueError(f"{str(file)!r} is no file of safetensors: {what}.") from error
            raise
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is not a {cls.family_name()} checkpoint: it lacks {len(missing)} "
                f"of the model's weights ({', '.join(missing[:3])}, ...). AutoModelForPromptClassification picks the "
                "class by the checkpoint's config."
            )
        if pretrained_model_name_or_path is None:  # transformers would call it "None"
            model.name_or_path = model.config.name_or_path = own_name or ""
        model.hub_settings = base
        keep_trainable(model)
        model._set_up(class_names, prompt_template, tokenizer)
        return (model, info) if with_info else model

    @classmethod
    def _of_open_clip(cls, checkpoint: OpenClipCheckpoint, name_or_path, *model_args, **kwargs) -> tuple[Self, dict]:
        """Builds a model from a checkpoint of open_clip, with the adapter of that name if it is one."""
        config = checkpoint.config
        if not isinstance(config, cls.config_class):
            raise ValueError(
                f"{checkpoint.name_or_path!r} is a checkpoint of open_clip that becomes a "
                f"{type(config).__name__.removesuffix('Config')}Model, and no {cls.base_class.__name__}. "
                "AutoModelForPromptClassification picks the class by the checkpoint's config."
            )
        if isinstance(own := kwargs.pop("config", None), PreTrainedConfig):
            config = own
        else:  # what from_pretrained does with the settings of a config among its arguments
            for key in [key for key in kwargs if hasattr(config, key) and key not in ("dtype", "torch_dtype")]:
                setattr(config, key, kwargs.pop(key))
        adapter = {key: kwargs.pop(key) for key in ("adapter_kwargs", "adapter_name") if key in kwargs}
        kwargs = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
        tensors = checkpoint.state_dict()
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        model.name_or_path = model.config.name_or_path = checkpoint.name_or_path
        if str(name_or_path) != checkpoint.name_or_path or os.path.isfile(os.path.join(name_or_path, CONFIG_NAME)):
            model.load_adapter(str(name_or_path), **adapter)
        return model, info

    @classmethod
    def from_base(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
        **hub_arguments,
    ) -> Self:
        """Creates a classifier from a model of the family in memory. They share their modules.

        Pass `token`, `revision`, ... of the model again, for its tokenizer: transformers does not keep them.

        Raises:
            TypeError: If the model is of another family, or an argument is not about the Hub.
            ValueError: If names or template are not valid.
        """
        hub = HubSettings(**hub_arguments) if hub_arguments else hub_settings_of(model)
        if not isinstance(model, cls.base_class):
            hint = "; of a PeftModel pass get_base_model()" if hasattr(model, "get_base_model") else ""
            raise TypeError(
                f"{cls.__name__} is made from a {cls.base_class.__name__}, got a {type(model).__name__}{hint}."
            )
        classifier = with_modules_of(model, cls)
        classifier.hub_settings = hub
        keep_trainable(classifier)
        classifier._set_up(class_names, prompt_template, tokenizer)
        return classifier

    def to_base(self) -> PreTrainedModel:
        """Returns the plain model of the family. They share their modules.

        Its config has no `id2label`: `CLIPForImageClassification` and its kin would give these names to the outputs of
        a new layer on the image tower.

        Raises:
            ValueError: If an adapter is still in the classifier.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"The adapters {sorted(self.peft_config)} are still in the model; call merge_and_unload() or unload() "
                "on the PeftModel first and then this method on what it returns."
            )
        plain = with_modules_of(self, self.base_class)
        del plain.image_head, plain.class_head
        unnamed = type(plain.config)()
        plain.config.id2label, plain.config.label2id = unnamed.id2label, unnamed.label2id
        if getattr(plain.config, "logit_temperature", None) is not None:
            logger.warning(
                "The temperature %.4g of the classifier is left out, which a plain %s would not apply: divide its "
                "logits by it for the same probabilities.",
                plain.config.logit_temperature,
                self.base_class.__name__,
            )
        for name in ("custom_pipelines", "logit_temperature", "conformal_scores"):  # of a classifier
            if hasattr(plain.config, name):
                delattr(plain.config, name)
        return plain

    @classmethod
    def family_name(cls) -> str:
        """Returns the name of the family, such as `"CLIP"`."""
        return cls.base_class.__name__.removesuffix("Model")

    def _set_up(self, class_names, prompt_template, tokenizer) -> None:
        layout = self.prompt_layout or self.class_head.adapter_config  # of an adapter loaded with the checkpoint
        if prompt_template is None:
            saved = getattr(self.config, "prompt_template", None)
            prompt_template = saved or (layout and layout.prompt_template) or self.default_template
        # An adapter's classes come before those of its base model, which may be a saved classifier.
        saved_names = (layout and layout.class_names) or getattr(self.config, "class_names", None)
        if self.config.problem_type is None and layout is not None:
            self.config.problem_type = layout.problem_type
        self.tokenizer = tokenizer
        self.set_prompt_template(prompt_template)
        if self.prompt_layout is not None:
            self.text_embeddings.label_with(self.config)
        self.class_head.label_with(self.config)
        if class_names is None and not (tokenizer or self.name_or_path):  # prompts are made once there is a tokenizer
            self.config.class_names = saved_names and check_class_names(saved_names)
            name_labels(self.config, self.config.class_names)
            self.names_were_given = saved_names is not None
        elif (class_names or saved_names) is None:
            self.config.class_names = None
        else:
            self.set_class_names(class_names or saved_names)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the model as the family's own `save_pretrained` does, the tokenizer for the class prompts, and code.

        The code is a short file by which `transformers.pipeline("image-classification", ..., trust_remote_code=True)`
        loads this class. Without it, transformers would put a new layer on the image tower and answer at random.

        With an adapter from transformers' `add_adapter` in the model, only the adapter is saved.
        """
        self.label_check.read()  # before any file is written
        is_main_process, push_to_hub = kwargs.get("is_main_process", True), kwargs.pop("push_to_hub", False)
        saves_all = is_main_process and not self._hf_peft_config_loaded
        tokenizer = None
        if saves_all:
            if self.tokenizer is None and not self.name_or_path:
                logger.warning("The classifier has no tokenizer to save beside it; pass tokenizer=... to load it.")
            else:
                tokenizer = self._get_tokenizer()
        self.config.custom_pipelines = custom_pipelines()
        super().save_pretrained(save_directory, **kwargs)  # it would push before all files are there
        if saves_all:
            shutil.copy(PIPELINE_FILE, save_directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)
        if push_to_hub and is_main_process:
            settings = {name: kwargs[name] for name in PUSH_SETTINGS if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.normpath(save_directory)), **settings)

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """Loads an adapter as transformers does, but refuses those that would change the frozen model."""
        check_adapter(peft_model_id, **kwargs)
        return super().load_adapter(peft_model_id, *args, **kwargs)
