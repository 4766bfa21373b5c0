"""Prompt tuning of CLIP as a peft method: config, layer, model, as every method of peft."""

from .config import CLIPPromptPeftType, CLIPPromptTaskType, CLIPPromptTuningConfig
from .layer import CLIPTextLearnableEmbeddings
from .model import CLIPPromptTuningModel


__all__ = [
    "CLIPPromptPeftType",
    "CLIPPromptTaskType",
    "CLIPPromptTuningConfig",
    "CLIPPromptTuningModel",
    "CLIPTextLearnableEmbeddings",
]
