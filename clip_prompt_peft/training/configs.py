"""The configuration of a published method by its name: of prompts, of class heads, or of a method of peft's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peft import LoraConfig, PeftConfig
from torch import nn

from ..class_head import ClassHeadConfig
from ..class_head.presets import HEAD_PRESETS
from ..towers import attention_inputs, outside_of_layers
from ..tuner import CLIPPromptTuningConfig
from ..tuner.hub import hub_settings_of


def method_config(name: str, model: nn.Module, **overrides) -> PeftConfig:
    """
    Returns the configuration of a published method for a model, and `get_peft_model` makes its adapter.

    Prompts have a [`CLIPPromptTuningConfig`], class heads a [`ClassHeadConfig`], and other methods a configuration of
    peft. An adapter of those is one of peft's: it can be merged into the weights, and holds neither class names nor a
    template, which have to be given when it is loaded.

    Args:
        name (`str`):
            The name of a preset, one of `PRESETS`; `"2sfs"`, `"clap"`, `"zs-lp"`, `"tip-adapter"` or
            `"tip-adapter-f"`, see [`ClassHeadConfig`]; or `"clip-lora"`, see [`clip_lora_config`].
        model (`torch.nn.Module`):
            A classifier or another dual encoder of any supported family.
        overrides:
            Fields with other values than those of the method.

    Raises:
        ValueError: If the name is unknown, or the model has no parts that the method trains.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from clip_prompt_peft import AutoModelForPromptClassification, method_config, training_recipe

    >>> model = get_peft_model(model, method_config("clip-lora", model))
    >>> recipe = training_recipe("clip-lora", model, num_examples=len(train_dataset), shots=16)
    >>> ...  # train it with a Trainer
    >>> model.save_pretrained("pets-lora")
    >>> AutoModelForPromptClassification.from_pretrained("pets-lora", class_names=["cat", "dog"])
    ```
    """
    if name in PEFT_METHODS:
        return PEFT_METHODS[name](model, **overrides)
    return CLIPPromptTuningConfig.from_preset(name, model=model, **overrides)


def clip_lora_config(model: nn.Module, **overrides) -> LoraConfig:
    """
    Returns peft's own configuration of CLIP-LoRA (https://arxiv.org/abs/2405.18541).

    LoRA of rank 2 on the query, key and value projections of every layer of both towers, with the scaling
    `lora_alpha / sqrt(r)`. The authors have one setting, and the template `"a photo of a {}."`, for all data sets.

    Args:
        model (`torch.nn.Module`):
            A classifier or another dual encoder of any supported family.
        overrides:
            Fields of [`peft.LoraConfig`] with other values.

    Raises:
        ValueError: If a tower has no such projections.
    """
    fields = {
        "r": 2,
        "lora_alpha": 1,
        "use_rslora": True,
        "lora_dropout": 0.25,
        "revision": hub_settings_of(model).revision,  # of the base model, which peft does not look up
        **overrides,
    }
    if "target_modules" not in fields:
        fields["target_modules"] = attention_inputs(model)
        # AIMv2 pools images, and GroupViT groups patches, by attention of their own with the same names.
        fields.setdefault("exclude_modules", outside_of_layers(model, fields["target_modules"]) or None)
    return LoraConfig(**fields)


def class_head_config(name: str, model: nn.Module, **overrides) -> ClassHeadConfig:
    """Returns the configuration of a published class head, see [`ClassHeadConfig.from_preset`]."""
    return ClassHeadConfig.from_preset(name, **overrides)


# Methods that learn no prompts, so that their settings are no fields of a row in `PRESETS`.
PEFT_METHODS: dict[str, Callable[..., PeftConfig]] = {
    "clip-lora": clip_lora_config,
    **{name: partial(class_head_config, name) for name in HEAD_PRESETS},
}


def trains_image_tower(config: PeftConfig) -> bool:
    """Returns whether image embeddings change in training, so that they cannot be computed in advance."""
    if isinstance(config, ClassHeadConfig):
        return config.target_modules is not None
    return not isinstance(config, CLIPPromptTuningConfig) or bool(config.num_vision_virtual_tokens)
