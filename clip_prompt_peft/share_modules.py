"""From one class of model to another without copying a weight."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel


def share_modules(source: PreTrainedModel, target_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of `target_class` that holds the very modules of `source`."""
    with torch.device("meta"):  # these weights are thrown away at once
        model = target_class(copy.copy(source.config))
    for name, module in source.named_children():
        setattr(model, name, module)
    for name, parameter in source.named_parameters(recurse=False):  # logit scale, and bias where there is one
        setattr(model, name, parameter)
    for name in ("peft_config", "_hf_peft_config_loaded"):  # an adapter comes along with the modules
        if hasattr(source, name):
            setattr(model, name, getattr(source, name))
    return model.train(source.training)
