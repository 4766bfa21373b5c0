"""From one class of CLIP model to another without copying a weight."""

from __future__ import annotations

import copy

import torch
from transformers import CLIPModel


def share_modules(source: CLIPModel, target_class: type[CLIPModel]) -> CLIPModel:
    """A model of `target_class` that holds the very modules of `source`."""
    with torch.device("meta"):  # these weights are thrown away at once
        model = target_class(copy.copy(source.config))
    for name, module in source.named_children():
        setattr(model, name, module)
    model.logit_scale = source.logit_scale
    for name in ("peft_config", "_hf_peft_config_loaded"):  # an adapter comes along with the modules
        if hasattr(source, name):
            setattr(model, name, getattr(source, name))
    return model.train(source.training)
