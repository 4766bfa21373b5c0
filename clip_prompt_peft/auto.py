"""From an adapter alone to a whole classifier."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from transformers.utils import cached_file

from .classifier import CLIPForPromptClassification
from .mixed_batch import mixed_batch_forward
from .model_card import add_prompt_section, empty_card, is_hub_id
from .tuner import CLIPPromptTuningConfig


logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"


class PeftModelForPromptClassification(PeftModel):
    """
    The `PeftModel` that `get_peft_model` returns for a [`CLIPPromptTuningConfig`].

    It differs from `PeftModel` in two things: its model card names the classes, the template and the number of
    vectors, and shows how to load the adapter; and `forward` takes `adapter_names`, one for each image of a batch, see
    [`~mixed_batch.mixed_batch_forward`].

    The model may already hold adapters of other methods (LoRA, ...) from `model.add_adapter(config, name)`; see
    docs/lora_beside_prompts.md.

    **Attributes**:
        - **card_metrics** (`dict[str, float]`): results for the model card, to be set by the user.
    """

    card_metrics: dict[str, float] | None = None
    _repo_id: str | None = None

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

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes peft's card plus a section of ours; the Trainer calls this when it pushes."""
        path = os.path.join(output_dir, "README.md")
        if not os.path.exists(path):
            empty_card().save(path)  # peft would start from a page of "[More Information Needed]"
        super().create_or_update_model_card(output_dir)
        card = ModelCard.load(path)
        add_prompt_section(card, self.active_peft_config, self.card_metrics, self._repo_id)
        card.save(path)

    def push_to_hub(self, repo_id: str, **kwargs):
        """As `PeftModel.push_to_hub`; warns when others could not load the adapter for want of a base model id."""
        base = self.active_peft_config.base_model_name_or_path
        if not is_hub_id(base):
            logger.warning(
                "The base model of this adapter is %r, which nobody else can load. Set "
                "model.active_peft_config.base_model_name_or_path to the Hub id of the base model and push again.",
                base,
            )
        self._repo_id = repo_id
        return super().push_to_hub(repo_id, **kwargs)


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
        pretrained_model_name_or_path: str,
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
            ValueError: no prompt adapter there; weights that are a pickle; an adapter that names no base model.
        """
        hub = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        hub = {key: value for key, value in hub.items() if value is not None}
        config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if not isinstance(config, CLIPPromptTuningConfig):
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is an adapter of type {config.peft_type}, not of CLIP prompt "
                "tuning; load it with peft's own classes."
            )
        _refuse_pickles(pretrained_model_name_or_path, hub)
        base = base_model_name_or_path or config.base_model_name_or_path
        if not base:
            raise ValueError(
                f"The adapter {pretrained_model_name_or_path!r} does not name its base model; pass "
                "base_model_name_or_path."
            )
        model = CLIPForPromptClassification.from_pretrained(
            base,
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
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **hub,
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


def _refuse_pickles(name_or_path: str, hub: dict) -> None:
    # peft falls back to adapter_model.bin, a pickle, when there are no safetensors
    found = cached_file(name_or_path, WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        raise ValueError(
            f"{name_or_path!r} holds no {WEIGHTS_NAME}. Weights in other formats are pickles, which can run code when "
            "they are opened, and are not loaded; save the adapter again with save_pretrained (safetensors)."
        )
