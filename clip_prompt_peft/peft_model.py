"""The PeftModel of the method: mixed batches, the model card, and the way onto the Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME

from .card_details import CardDetails
from .mixed_batch import mixed_batch_forward
from .model_card import add_prompt_section, empty_card, is_hub_id
from .replacing_files import replacing_files
from .tuner import CLIPPromptTuningConfig


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
        - **card_metrics** (`dict[str, float]`): results for the model card, to be set by the user.
        - **card_details** (`CardDetails`): data, training and results for the model card, to be set by the user.
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
