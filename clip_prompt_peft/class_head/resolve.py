"""From a configuration of a head and a classifier to the configuration that is saved."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..heads import ClassHead
from ..templates import CLASS_SLOT, check_class_names
from ..text import normalize
from ..text.features import text_features
from ..towers import block_layer_norms, eval_mode, is_norm, unwrapped
from ..tuner.base_config import MULTI_LABEL
from ..tuner.base_layer import CLIPPromptLayer
from ..tuner.base_model import check_base_model, name_base_model
from .config import BLOCK_LAYER_NORMS, CACHE, ClassHeadConfig


HEAD = "class_head"  # its path in a classifier


def resolve(config: ClassHeadConfig, model) -> ClassHeadConfig:
    """Returns a copy of a configuration in which all fields are set that depend on the classifier.

    Raises:
        TypeError: If the model is no classifier.
        ValueError: If the model cannot take the head that the configuration asks for.
    """
    _check_model(model)
    resolved: Any = copy.copy(config)
    for name, value in config.set_at_injection.items():
        if getattr(config, name) == value:  # otherwise it was changed since
            setattr(resolved, name, None)
    if config.has_weights:
        if resolved.class_names is None:
            raise ValueError("The configuration of a saved head names no classes; it is damaged.")
        if resolved.embed_width != model.embed_width:
            raise ValueError(
                f"The adapter {config.described} has rows of {resolved.embed_width} values, but image and class "
                f"embeddings of this {type(model).__name__} have {model.embed_width}. The adapter was trained on "
                f"{config.base_model_name_or_path!r}; load that base model."
            )
        check_base_model(config, model)
        return resolved
    empty = [field.name for field in fields(config) if getattr(resolved, field.name) is None]
    if resolved.class_names is None and model.class_names is None:
        raise ValueError("A class head needs class names; call set_class_names([...]) on the classifier first.")
    resolved.class_names = check_class_names(resolved.class_names or model.class_names)
    resolved.prompt_template = resolved.prompt_template or model.prompt_template
    resolved.problem_type = resolved.problem_type or model.config.problem_type
    if resolved.problem_type == MULTI_LABEL and (resolved.pull or resolved.head_type == CACHE):
        raise ValueError(
            f"The classifier has problem_type={MULTI_LABEL!r}, but pull and head_type='cache' read one label of each "
            "training image; take a linear head without pull."
        )
    resolved.embed_width = model.embed_width
    name_base_model(resolved, model, [])
    resolved.set_at_injection = {name: getattr(resolved, name) for name in empty}
    return resolved


def _check_model(model: nn.Module) -> None:
    place = getattr(model, HEAD, None)
    if place is None or not isinstance(unwrapped(place), ClassHead):  # which the projection of an adapter may wrap
        raise TypeError(
            f"A class head is put into a classifier, and a {type(model).__name__} has no place for it. Load one with "
            "AutoModelForPromptClassification.from_pretrained, or make it of a model with from_base; a saved head is "
            "loaded with its base model by AutoPeftModelForPromptClassification.from_pretrained."
        )
    if any(isinstance(part, CLIPPromptLayer) for part in model.modules()):
        raise ValueError(
            "The classifier holds prompts, which would answer for the same classes as the head; merge them into the "
            "model (merge_and_unload) or remove them (unload) first."
        )


def layer_norms(config: ClassHeadConfig, model: nn.Module) -> list[str]:
    """Returns the paths of the LayerNorms that a configuration names.

    Raises:
        ValueError: If it names other modules, or none.
    """
    if config.target_modules is None:
        return []
    paths = [path for path, _ in model.named_modules() if not _is_inside_adapter(path)]
    if config.target_modules == BLOCK_LAYER_NORMS:
        named = block_layer_norms(model)
        by_path: Any = copy.copy(config)
        by_path.target_modules = set(named)
        found = [path for path in named if check_target_module_exists(by_path, path)]
    else:
        found = [path for path in paths if path and check_target_module_exists(config, path)]
    other = next((path for path in found if not is_norm(unwrapped(model.get_submodule(path)))), None)
    if other is not None:
        kind = type(unwrapped(model.get_submodule(other))).__name__
        raise ValueError(f"target_modules may name LayerNorms only, but {other!r} is a {kind}.")
    if not found:
        raise ValueError(
            f"target_modules={config.target_modules!r} names no LayerNorm of this {type(model).__name__}; "
            f"{BLOCK_LAYER_NORMS!r} names those in the layers of both towers."
        )
    return found


def _is_inside_adapter(path: str) -> bool:
    return any(name in path.split(".") for name in ("base_layer", "ln_tuning_layers", "ln_tuning_head"))


@torch.no_grad()
def start_of(config: ClassHeadConfig, model) -> torch.Tensor:
    """Returns the rows (C, E) that a head starts from, by the text tower as it is now."""
    templates = config.templates
    texts = {name: [template.replace(CLASS_SLOT, name) for template in templates] for name in config.class_names}
    with eval_mode(model):
        features = text_features(model, texts)  # (C, templates, E)
    if config.normalized_start:
        return normalize(normalize(features).mean(dim=1))
    return features.to(torch.promote_types(features.dtype, torch.float32)).mean(dim=1)
