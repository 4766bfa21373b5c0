"""Fits the tensors of a saved adapter to the model at hand."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter_files import check_values
from .config import CLIPPromptTuningConfig
from .prompt_layer import CLIPPromptLayer


PREFIX = "learnable_"  # of every container of adapter tensors
PEFT_PATH = "base_model.model."


def expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """All tensors of an adapter in `model`, by their names in its state dict."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, CLIPPromptLayer)
        for name, parameter in module.parameters_of(adapter_name)
    }


def rename_to_expected(state_dict: dict, expected: dict) -> dict:
    """Renames tensors that were trained in a tower at another path: `embeddings...` of a bare `CLIPTextModel`,
    `text_model.embeddings...` elsewhere."""
    return {_key_at_other_path(key, expected): value for key, value in state_dict.items()}


def check_tensors(
    state_dict: dict, expected: dict[str, torch.Tensor], config: CLIPPromptTuningConfig, adapter_name: str
) -> None:
    """Raises `ValueError` if a tensor is missing or one too many, has another shape than the model and the
    configuration ask for, or holds what no training gives."""
    for key, parameter in expected.items():
        if key not in state_dict:
            raise ValueError(
                f"The adapter's weights hold no {key!r}, only {sorted(state_dict)}; the file is damaged or belongs to "
                "another method."
            )
        shape, wanted = tuple(state_dict[key].shape), tuple(parameter.shape)
        if shape != wanted:
            raise ValueError(
                f"The adapter's {key!r} has shape {shape}, but this model and the adapter's configuration ask for "
                f"{wanted} (num_virtual_tokens, class_names, hidden sizes). The adapter was trained on "
                f"{config.base_model_name_or_path!r}; load that base model."
            )
    check_values(state_dict)
    for key in state_dict:
        if key not in expected and f".modules_to_save.{adapter_name}." not in key:
            raise ValueError(
                f"The adapter's weights hold {key!r}, which its configuration does not ask for and which could change "
                "the frozen model; the file is damaged, or not to be trusted."
            )


def _key_at_other_path(key: str, expected: dict) -> str:
    if key in expected or f".{PREFIX}" not in key:
        return key
    path, name = _split(key)
    for candidate in expected:
        other_path, other_name = _split(candidate)
        same_name = name == _without_adapter(other_name)  # keys of a file do not hold the adapter's name
        if same_name and (path.endswith(other_path) or other_path.endswith(path)):
            return candidate
    return key


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.removeprefix(PEFT_PATH).partition(f".{PREFIX}")
    return f".{path}", name


def _without_adapter(name: str) -> str:
    container, _, rest = name.partition(".")
    return ".".join([container, *rest.split(".")[1:]])
