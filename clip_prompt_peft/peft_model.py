"""Writing a folder so that a full disk or a killed process never leaves half a file in it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.modeling_outputs import ImageClassifierOutput

from .evaluation.model_card import CardDetails, add_prompt_section, empty_card, is_hub_id
from .modeling import PromptClassificationMixin
from .towers import image_side
from .tuner import CLIPPromptPeftType, CLIPPromptTaskType, CLIPPromptTuningConfig, CLIPPromptTuningModel


@contextmanager
def replacing_files(folder: str | os.PathLike, kept: Sequence[str], last: str) -> Iterator[str]:
    """Gives a new folder to write into; what is in it then replaces the files of the same names in `folder`.

    If the body raises, `folder` stays as it is. A link in the place of a file is replaced, not followed.

    Args:
        folder: to change; exists.
        kept: names of files that the body reads and changes; the new folder has copies of them.
        last: name of the files without which the others are nothing. They come last, and old ones that differ go
            first: whoever is killed in between leaves a folder that is refused, and not a mixture of old and new.
    """
    with TemporaryDirectory(dir=folder, prefix=".saving-") as new:
        for name in kept:
            if os.path.isfile(os.path.join(folder, name)):
                shutil.copy(os.path.join(folder, name), new)
        yield new
        files = sorted((file for file in Path(new).rglob("*") if file.is_file()), key=lambda file: file.name == last)
        targets = {file: Path(folder) / file.relative_to(new) for file in files}
        for file, target in targets.items():
            if file.name == last and target.is_file() and target.read_bytes() != file.read_bytes():
                target.unlink()
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


def mixed_batch_forward(
    model: PeftModel,
    adapter_names: Sequence[str],
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    **image_inputs,
) -> ImageClassifierOutput:
    """Scores every image against the classes of its own adapter, as `adapter_names` does for LoRA in peft.

    All images go through the image tower together, unless there are prompts (or `modules_to_save`) in the image tower
    as well: then those of one adapter do. Which adapter is active stays as it is.

    Args:
        model: a prompt-tuned classifier, in eval mode.
        adapter_names: B names of loaded prompt adapters, or `"__base__"` for the model without prompts.
        pixel_values, image_embeds, image_inputs: as for the classifier.

    Returns:
        `ImageClassifierOutput` whose `logits` are (B, C) where all images have the same classes, otherwise a list of B
        tensors (C of that adapter,).

    Raises:
        TypeError: names that are not a list of strings; a base model that is no classifier.
        ValueError: unknown names, or another number of them than there are images; training mode; merged adapters.
    """
    classifier = model.get_base_model()
    images = pixel_values if pixel_values is not None else image_embeds
    image_inputs["pixel_values"] = pixel_values
    _check_model(model, classifier)
    _check_names(model, adapter_names, images)
    if image_embeds is None and not _image_tower_is_tuned(model, classifier):
        image_embeds, image_inputs = classifier.get_image_features(**image_inputs).pooler_output, {}  # (B, E)
    logits: list[torch.Tensor] = [None] * len(adapter_names)
    class_lists = []
    for name, rows in _rows_by_name(adapter_names).items():
        with _only(model, name):
            output = classifier(**_rows_of({"image_embeds": image_embeds, **image_inputs}, rows))
            class_lists.append(classifier.class_names)
        for row, of_image in zip(rows, output.logits):  # of_image: (C,)
            logits[row] = of_image
    same_classes = all(names == class_lists[0] for names in class_lists)
    return ImageClassifierOutput(logits=torch.stack(logits) if same_classes else logits)


def _check_model(model, classifier) -> None:
    if not isinstance(classifier, PromptClassificationMixin):
        raise TypeError(
            f"adapter_names is for images that are scored against class names, but the base model is a "
            f"{type(classifier).__name__}; make it a classifier (AutoModelForPromptClassification.from_base), or "
            "switch with set_adapter."
        )
    if model.training:
        raise ValueError("adapter_names is for inference, but the model is in training mode; call model.eval() first.")
    merged = {name for layer in _tuner_layers(model, classifier) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"adapter_names cannot be used while adapters are merged ({sorted(merged)}); call unmerge_adapter() first."
        )


def _check_names(model, adapter_names, images) -> None:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list with one name for each image, got {adapter_names!r}.")
    loaded = [name for name, config in model.peft_config.items() if isinstance(config, CLIPPromptTuningConfig)]
    unknown = sorted({*adapter_names} - {*loaded, BASE})
    if unknown:
        raise ValueError(
            f"There is no prompt adapter {unknown[0]!r}; loaded are {sorted(loaded)}, and {BASE!r} stands for none."
        )
    if images is None:
        raise ValueError("Give either pixel_values or image_embeds, got neither.")
    if len(adapter_names) != len(images):
        raise ValueError(
            f"adapter_names must name one adapter for each image, got {len(adapter_names)} names for {len(images)} "
            "images."
        )
    if not len(images):
        raise ValueError("The batch is empty; give at least one image.")


def _rows_by_name(adapter_names: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name, []).append(row)
    return rows


def _rows_of(inputs: dict, rows: list[int]) -> dict:
    """Of tensors those rows, of settings what they are."""
    return {name: value[rows] if torch.is_tensor(value) else value for name, value in inputs.items()}


def _tuner_layers(model: PeftModel, part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    layer_class = model.base_model.tuner_layer_cls
    return (module for module in part.modules() if isinstance(module, layer_class))


def _image_tower_is_tuned(model: PeftModel, classifier: PromptClassificationMixin) -> bool:
    for part in image_side(classifier):
        saved = any(isinstance(module, AuxiliaryTrainingWrapper) for module in part.modules())
        if saved or any(_tuner_layers(model, part)):
            return True
    return False


@contextmanager
def _only(model: PeftModel, name: str) -> Iterator[None]:
    """Makes one adapter the active one for a while; under a name that no layer has, the model is the base model."""
    tuner = model.base_model
    active = tuner.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]  # set_adapter changes that
    tuner.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(active, inference_mode=True)
        for parameter in trainable:
            parameter.requires_grad_(True)


logger = logging.getLogger(__name__)


class PeftModelForPromptClassification(PeftModel):
    """
    The `PeftModel` that `get_peft_model` returns for a [`CLIPPromptTuningConfig`].

    It differs from `PeftModel` in three things: its model card names the classes, the template and the number of
    vectors, and shows how to load the adapter; and `forward` takes `adapter_names`, one for each image of a batch, see
    [`~mixed_batch.mixed_batch_forward`]; saving replaces an older adapter as a whole or not at all.

    The model may already hold adapters of other methods (LoRA, ...) from `model.add_adapter(config, name)`; see
    docs/lora_beside_prompts.md.

    **Attributes**:
        - **card_metrics** (`dict[str, float]`) -- Results by name for the model card. Set by the user.
        - **card_details** (`CardDetails`) -- Training data, settings and a comparison with the zero-shot model for the
          model card. Set by the user.
        - **hub_repo_id** (`str`): id of the adapter's repository, for the card's snippet. Set by `push_to_hub`; set it
          yourself before `Trainer.push_to_hub`, which does not tell the model.
    """

    card_metrics: Mapping[str, float] | None = None
    card_details: CardDetails | None = None
    hub_repo_id: str | None = None
    _is_saving = False

    def __init__(self, model, peft_config, adapter_name: str = "default", **kwargs) -> None:
        """
        Raises:
            ValueError: an adapter of another method in the model that would be lost or switched off by this one.
        """
        _check_other_methods(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        """As the base model's `forward`; with `adapter_names`, each image is scored by the adapter of that name."""
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        return mixed_batch_forward(self, adapter_names, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = False,
        **kwargs,
    ) -> None:
        """As `PeftModel.save_pretrained`, with two differences.

        What is in the folder stays as it is until all that is new has been written beside it: neither a full disk nor
        a killed process leaves half a file. And the Hub is never asked whether the vocabulary has grown since, which
        peft does by default.

        Raises:
            ValueError: NaN or Inf in the adapter.
        """
        if not kwargs.get("is_main_process", True):
            return
        if os.path.isfile(save_directory):
            raise ValueError(f"An adapter is saved into a folder, but {str(save_directory)!r} is a file.")
        self._check_finite(selected_adapters, kwargs.get("state_dict"))
        os.makedirs(save_directory, exist_ok=True)
        self._is_saving = True
        try:
            with replacing_files(save_directory, kept=["README.md"], last=CONFIG_NAME) as folder:
                super().save_pretrained(folder, safe_serialization, selected_adapters, save_embedding_layers, **kwargs)
        finally:
            self._is_saving = False

    def _check_finite(
        self, selected_adapters: list[str] | None, state_dict: Mapping[str, torch.Tensor] | None
    ) -> None:
        for adapter_name in set(selected_adapters or self.peft_config) & set(self.peft_config):
            tensors = get_peft_model_state_dict(self, state_dict, adapter_name, save_embedding_layers=False)
            broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
            if broken:
                raise ValueError(
                    f"The adapter {adapter_name!r} is not saved, since {broken[0]!r} holds NaN or Inf: its training "
                    "has diverged. Train again with a lower learning rate; the callback StopAtNonFinite tells the "
                    "step at which it happens."
                )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes peft's card plus a section of ours.

        `save_pretrained` calls this, and so does the Trainer before it pushes. The latter goes past `push_to_hub`, so
        a base model that others cannot load is warned of here, but not whenever something is merely saved.
        """
        if not self._is_saving:
            self._warn_of_local_base_model()
        path = os.path.join(output_dir, "README.md")
        if not os.path.exists(path):
            empty_card().save(path)  # peft would start from a page of "[More Information Needed]"
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
        """Uploads adapter and model card. A card that is on the Hub already keeps what else stands in it.

        Written anew, since transformers' own `push_to_hub` puts a card of its own in place of the one that
        `save_pretrained` wrote. The arguments are the same.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: whatever the Hub answers; nothing is changed then.
        """
        self._warn_of_local_base_model()
        api = HfApi(token=token)
        self.hub_repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            card = self._card_on_hub(token)
            card.data.tags = [*(card.data.tags or []), *(tags or [])]
            card.save(os.path.join(folder, "README.md"))
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

    def _card_on_hub(self, token) -> ModelCard:
        try:
            return ModelCard.load(self.hub_repo_id, token=token)
        except EntryNotFoundError:
            return empty_card()

    def _warn_of_local_base_model(self) -> None:
        base = self.active_peft_config.base_model_name_or_path
        if not is_hub_id(base):
            logger.warning(
                "The base model of this adapter is %r, which nobody else can load. Set "
                "model.active_peft_config.base_model_name_or_path to the Hub id of the base model and push again.",
                base,
            )


def _check_other_methods(model, adapter_name: str) -> None:
    # configurations of all methods share one dictionary, and peft lets one adapter at a time have its modules_to_save
    others = {
        name: config
        for name, config in (getattr(model, "peft_config", None) or {}).items()
        if not isinstance(config, CLIPPromptTuningConfig)
    }
    if adapter_name in others:
        raise ValueError(
            f"The model already holds a {others[adapter_name].peft_type.value} adapter named {adapter_name!r}, whose "
            "configuration would be lost; give the prompts another name with adapter_name."
        )
    with_modules = [name for name, config in others.items() if getattr(config, "modules_to_save", None)]
    if with_modules:
        raise ValueError(
            f"The adapter {with_modules[0]!r} in the model has modules_to_save, which peft would switch off as soon "
            "as prompts are put beside it; merge it into the model first, or train it without modules_to_save."
        )


def register() -> None:
    """Enters the method into peft's mappings.

    `peft.utils.register_peft_method` takes only names of the closed enum `PeftType`. The mappings that it fills are
    plain dicts that accept members of our own enums, so those are filled here.
    """
    method = CLIPPromptPeftType.CLIP_PROMPT_TUNING
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = CLIPPromptTuningConfig
    PEFT_TYPE_TO_TUNER_MAPPING[method] = CLIPPromptTuningModel
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = CLIPPromptTuningModel.prefix
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[CLIPPromptTaskType.PROMPT_CLASSIFICATION] = PeftModelForPromptClassification
