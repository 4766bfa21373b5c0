"""The `PeftModel` of a prompt-tuned classifier, batches with several adapters, atomic saving, and registration."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.modeling_outputs import ImageClassifierOutput

from .class_head import ClassHeadConfig, ClassHeadModel
from .evaluation.model_card import CardDetails, add_prompt_section, empty_card, is_hub_id
from .modeling import PromptClassificationMixin
from .towers import execution_device, image_side, trainable_parameters
from .tuner import (
    ClassifierAdapterConfig,
    CLIPPromptPeftType,
    CLIPPromptTaskType,
    CLIPPromptTuningConfig,
    CLIPPromptTuningModel,
)
from .tuner.projection import TEACHER_EMBEDS


BASE = "__base__"  # peft's name for "no adapter" in a mixed batch
CARD_NAME = "README.md"
NEW_FILES = ".saving-"  # the prefix of the temporary folder that an adapter is written into

logger = logging.getLogger(__name__)


@contextmanager
def without_warning_of_renamed_property() -> Iterator[None]:
    """Hides the `FutureWarning` that comes as peft reads a property of the model that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


class PeftModelForPromptClassification(PeftModel):
    """
    The `PeftModel` that `get_peft_model` returns for a [`CLIPPromptTuningConfig`] or a [`ClassHeadConfig`].

    It adds to `PeftModel`:
    - a section in the model card about classes, template and vectors, which shows how to load the adapter;
    - `adapter_names` in `forward`, with one adapter for each image of a batch;
    - atomic saving: an older adapter in the folder is replaced completely or not at all.

    The model may already hold adapters of other methods (LoRA, ...) from `model.add_adapter(config, name)`, see
    docs/lora_beside_prompts.md.

    **Attributes**:
        - **card_metrics** (`Mapping[str, float]`, *optional*) -- Results by name for the model card. Set it before
          saving.
        - **card_details** (`CardDetails`, *optional*) -- Training data, settings and a comparison with the zero-shot
          model for the model card. Set it before saving.
        - **hub_repo_id** (`str`, *optional*) -- The Hub id of the adapter, which the model card shows. `push_to_hub`
          sets it. Set it yourself before `Trainer.push_to_hub`, which does not pass the id on to the model.

    Raises:
        ValueError: If the model holds an adapter of another method that would be lost or switched off.
    """

    card_metrics: Mapping[str, float] | None = None
    card_details: CardDetails | None = None
    hub_repo_id: str | None = None

    def __init__(self, model, peft_config, adapter_name: str = "default", **kwargs) -> None:
        _check_other_methods(model, adapter_name)
        with without_warning_of_renamed_property():
            super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        """Runs the base model. With `adapter_names`, each image is scored by its own adapter.

        Args:
            adapter_names (`Sequence[str]`, *optional*):
                The name of an adapter for each image, see [`mixed_batch_forward`].
            args, kwargs:
                The arguments of the base model.
        """
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        return mixed_batch_forward(self, adapter_names, *args, **kwargs)

    def load_adapter(
        self, model_id, adapter_name: str, is_trainable: bool = False, torch_device: str | None = None, *args, **kwargs
    ):
        """Loads an adapter, with the arguments of `PeftModel.load_adapter`.

        By default its weights are read to the device of the model. peft would read them to a card that is in the
        machine, whether the model is on it or not, and take memory there.
        """
        if torch_device is None:
            device = execution_device(self)
            torch_device = "cpu" if device.type == "meta" else str(device)
        return super().load_adapter(model_id, adapter_name, is_trainable, torch_device, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = False,
        **kwargs,
    ) -> None:
        """Saves adapters and the model card, with the arguments of `PeftModel.save_pretrained`.

        Files in the folder are only replaced once all new ones are written, so neither a full disk nor a killed
        process leaves half a file. Unlike peft, it does not ask the Hub for the vocabulary size of the base model.

        Raises:
            ValueError: If the adapter holds NaN or Inf, tensors of it are missing, or `save_directory` is a file.
        """
        if not kwargs.get("is_main_process", True):
            return
        if os.path.isfile(save_directory):
            raise ValueError(f"An adapter is saved into a folder, but {str(save_directory)!r} is a file.")
        if isinstance(classifier := self.get_base_model(), PromptClassificationMixin):
            classifier.label_check.read()
        self._check_tensors(selected_adapters, kwargs.get("state_dict"))
        os.makedirs(save_directory, exist_ok=True)
        with replace_files_at_once(save_directory) as new_files:
            super().save_pretrained(new_files, safe_serialization, selected_adapters, save_embedding_layers, **kwargs)

    def _check_tensors(self, selected_adapters: list[str] | None, state_dict) -> None:
        for adapter_name in self.peft_config.keys() & (selected_adapters or self.peft_config):
            tensors = get_peft_model_state_dict(self, state_dict, adapter_name, save_embedding_layers=False)
            expected = self.base_model.tensors_of(adapter_name)
            if sum(f".{self.base_model.prefix}" in f".{name}" for name in tensors) < len(expected):
                raise ValueError(
                    f"The adapter {adapter_name!r} is not saved, since only {sorted(tensors)} of its {len(expected)} "
                    "tensors were found: modules around its layers (activation checkpointing, FSDP) hide the others "
                    "from peft. Save the model without them, or use model.gradient_checkpointing_enable()."
                )
            broken = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
            if broken is not None and TEACHER_EMBEDS in broken:
                raise ValueError(
                    f"The adapter {adapter_name!r} is not saved, since it has no class embeddings of a teacher yet, "
                    "or not of all classes: train it with DistillationTrainer(teacher=...), or call "
                    "model.set_teacher_class_embeds(teacher.get_class_embeds())."
                )
            if broken is not None:
                raise ValueError(
                    f"The adapter {adapter_name!r} is not saved, since {broken!r} holds NaN or Inf: the training "
                    "diverged. Use a lower learning rate; the callback StopAtNonFinite reports the step."
                )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes the model card of peft with a section about the prompts.

        Args:
            output_dir (`str`):
                The folder of the card. A card in it is updated and keeps its text and tags.
        """
        # The Trainer, unlike `save_pretrained`, calls this with its output folder right before it pushes.
        if not os.path.basename(output_dir).startswith(NEW_FILES):
            self._warn_of_local_base_model()
        path = os.path.join(output_dir, CARD_NAME)
        if not os.path.exists(path):
            empty_card().save(path)  # peft would start with a template full of "[More Information Needed]"
        tags = ModelCard.load(path).data.tags or []  # peft replaces them
        super().create_or_update_model_card(output_dir)
        card = ModelCard.load(path)
        card.data.tags = [*tags, *(card.data.tags or [])]
        add_prompt_section(card, self.active_peft_config, self.card_metrics, self.hub_repo_id, self.card_details)
        card.save(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload prompts",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Uploads the adapter and its model card, with the arguments of `push_to_hub` in transformers.

        A card on the Hub keeps its text and tags. The method of transformers would replace the card that
        `save_pretrained` writes with one of its own.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: If the Hub refuses or fails. The repository keeps its files then.
        """
        self._warn_of_local_base_model()
        api = HfApi(token=token)
        self.hub_repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            card = ModelCard.load(self.hub_repo_id, token=token)
        except EntryNotFoundError:
            card = empty_card()
        card.data.tags = [*(card.data.tags or []), *(tags or [])]
        with TemporaryDirectory() as folder:
            card.save(os.path.join(folder, CARD_NAME))
            self.save_pretrained(folder)
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(self.hub_repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=self.hub_repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _warn_of_local_base_model(self) -> None:
        base = self.active_peft_config.base_model_name_or_path
        if not is_hub_id(base):
            logger.warning(
                "The base model %r of this adapter is not a Hub id. Set "
                "model.active_peft_config.base_model_name_or_path to the Hub id of the base model and push again.",
                base,
            )


def _check_other_methods(model, adapter_name: str) -> None:
    # Adapters of all methods share one dictionary of configurations, and peft allows only one of them at a time to
    # have its `modules_to_save` active.
    configs = getattr(model, "peft_config", None) or {}
    others = {name: config for name, config in configs.items() if not isinstance(config, ClassifierAdapterConfig)}
    if adapter_name in others:
        raise ValueError(
            f"The model already holds a {others[adapter_name].peft_type.value} adapter named {adapter_name!r}; choose "
            "another adapter_name for the prompts."
        )
    for name, config in others.items():
        if getattr(config, "modules_to_save", None):
            raise ValueError(
                f"The adapter {name!r} in the model has modules_to_save, which peft would switch off when prompts are "
                "added; merge it into the model first, or train it without modules_to_save."
            )


def mixed_batch_forward(
    model: PeftModel,
    adapter_names: Sequence[str],
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    **image_inputs,
) -> ImageClassifierOutput:
    """Scores every image of a batch against the classes of its own adapter, like `adapter_names` for LoRA in peft.

    The image tower runs once for all images. If adapters change it (vision prompts, `modules_to_save`), it runs once
    for each adapter. The active adapter stays the same.

    Args:
        model (`PeftModel`):
            A prompt-tuned classifier in eval mode.
        adapter_names (`Sequence[str]`):
            B names of prompt adapters, or `"__base__"` for the model without prompts.
        pixel_values, image_embeds, image_inputs:
            The inputs of the classifier.

    Returns:
        `ImageClassifierOutput`: `logits` are (B, C) if all images have the same classes, and otherwise a list of B
        tensors (C,), each with the C classes of its adapter.

    Raises:
        TypeError: If `adapter_names` is not a list of strings, or the base model is not a classifier.
        ValueError: If a name is unknown, there is not one name for each image, the model is in training mode, or
            adapters are merged.
    """
    classifier = model.get_base_model()
    _check_model(model, classifier)
    _check_names(model, adapter_names, image_embeds if pixel_values is None else pixel_values)
    image_inputs["pixel_values"] = pixel_values
    # Adapters of other methods, such as LoRA, act on all images, so they do not have to be told apart.
    own_layers = (model.base_model.tuner_layer_cls, AuxiliaryTrainingWrapper)
    tower_parts = (part for side in image_side(classifier) for part in side.modules())
    if image_embeds is None and not any(isinstance(part, own_layers) for part in tower_parts):
        image_embeds, image_inputs = classifier.get_image_features(**image_inputs).pooler_output, {}  # (B, E)
    inputs = {"image_embeds": image_embeds, **image_inputs}
    logits: dict[int, torch.Tensor] = {}  # (C,) by the index of the image
    class_lists = []
    for name in dict.fromkeys(adapter_names):
        indices = [i for i, name_of_image in enumerate(adapter_names) if name_of_image == name]
        with _only_active(model, name):
            own_inputs = {key: value[indices] if torch.is_tensor(value) else value for key, value in inputs.items()}
            output = classifier(**own_inputs)
            class_lists.append(classifier.class_names)
        logits.update(zip(indices, output.logits))
    in_order = [logits[i] for i in range(len(adapter_names))]
    same_classes = all(names == class_lists[0] for names in class_lists)
    return ImageClassifierOutput(logits=torch.stack(in_order) if same_classes else in_order)


def _check_model(model: PeftModel, classifier) -> None:
    if not isinstance(classifier, PromptClassificationMixin):
        raise TypeError(
            f"adapter_names needs a classifier, but the base model is a {type(classifier).__name__}; create one with "
            "AutoModelForPromptClassification.from_base, or switch adapters with set_adapter."
        )
    if model.training:
        raise ValueError("adapter_names is for inference, but the model is in training mode; call model.eval() first.")
    layers = [part for part in classifier.modules() if isinstance(part, model.base_model.tuner_layer_cls)]
    merged = {name for layer in layers for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"Some adapters are merged ({sorted(merged)}); call unmerge_adapter() before using adapter_names."
        )


def _check_names(model: PeftModel, adapter_names, images: torch.Tensor | None) -> None:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list with one name for each image, got {adapter_names!r}.")
    loaded = sorted(name for name, config in model.peft_config.items() if isinstance(config, ClassifierAdapterConfig))
    unknown = sorted({*adapter_names} - {*loaded, BASE})
    if unknown:
        raise ValueError(f"There is no adapter {unknown[0]!r}; loaded are {loaded}, and {BASE!r} means none.")
    if images is None:
        raise ValueError("Give either pixel_values or image_embeds, got neither.")
    if len(adapter_names) != len(images):
        raise ValueError(
            f"adapter_names needs one name for each image, got {len(adapter_names)} names for {len(images)} images."
        )
    if not len(images):
        raise ValueError("The batch is empty; give at least one image.")


@contextmanager
def _only_active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Activates one adapter for a while. No layer has an adapter named `BASE`, which gives the base model."""
    active, trainable = model.base_model.active_adapter, trainable_parameters([model])
    model.base_model.set_adapter(adapter_name, inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(active, inference_mode=True)  # which freezes its parameters
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def replace_files_at_once(folder: str | os.PathLike) -> Iterator[str]:
    """Provides a temporary folder for the files of an adapter, and then moves them to `folder`.

    If the body raises, `folder` stays as it is. The configuration is moved last, and an old one that differs is
    removed first: a process that is killed in between leaves a folder that cannot be loaded instead of old and new
    files together. A link is replaced, and its target is not changed.

    Args:
        folder (`str` or `os.PathLike`):
            An existing folder. Its model card is copied to the temporary folder, to be updated there.
    """
    with TemporaryDirectory(dir=folder, prefix=NEW_FILES) as new_files:
        card = os.path.join(folder, CARD_NAME)
        if os.path.isfile(card):
            shutil.copy(card, new_files)
        yield new_files
        files = sorted(filter(Path.is_file, Path(new_files).rglob("*")), key=lambda file: file.name == CONFIG_NAME)
        targets = {file: Path(folder) / file.relative_to(new_files) for file in files}
        for file, target in targets.items():
            if file.name == CONFIG_NAME and target.is_file() and target.read_bytes() != file.read_bytes():
                target.unlink()
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def register() -> None:
    """Adds the methods to the mappings of peft.

    `peft.utils.register_peft_method` only accepts members of the closed enum `PeftType`. The mappings are plain
    dictionaries, so members of our own enums can be added to them directly.
    """
    methods: dict[CLIPPromptPeftType, tuple[type[PeftConfig], Any]] = {
        CLIPPromptPeftType.CLIP_PROMPT_TUNING: (CLIPPromptTuningConfig, CLIPPromptTuningModel),
        CLIPPromptPeftType.CLIP_CLASS_HEAD: (ClassHeadConfig, ClassHeadModel),
    }
    for method, (config_class, tuner_class) in methods.items():
        PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner_class
        PEFT_TYPE_TO_PREFIX_MAPPING[method] = tuner_class.prefix
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[CLIPPromptTaskType.PROMPT_CLASSIFICATION] = PeftModelForPromptClassification
