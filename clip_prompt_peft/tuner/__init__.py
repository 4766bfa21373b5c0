"""Prompt tuning of CLIP as a peft method: config, layers, model, as every method of peft.

| file | what |
|---|---|
| `config.py`, `checks.py` | all choices in one configuration |
| `layer.py` | vectors in the text (CoOp) |
| `meta_net.py` | made to depend on the image (CoCoOp) |
| `deep_prompts.py` | in front of deeper layers (VPT deep, IVLP, MaPLe) |
| `vision_prompts.py` | behind the patches of the image (VPT, IVLP, MaPLe) |
| `coupling.py` | vision prompts as maps of text prompts (MaPLe) |
| `model.py`, `towers.py`, `resolve.py`, `saved_weights.py` | how they get into a model, and from a file |
"""

from .config import CLIPPromptPeftType, CLIPPromptTaskType, CLIPPromptTuningConfig
from .layer import CLIPTextLearnableEmbeddings
from .model import CLIPPromptTuningModel
from .vectors import CLIPDeepPrompts, CLIPVisionLearnableEmbeddings


__all__ = [
    "CLIPDeepPrompts",
    "CLIPPromptPeftType",
    "CLIPPromptTaskType",
    "CLIPPromptTuningConfig",
    "CLIPPromptTuningModel",
    "CLIPTextLearnableEmbeddings",
    "CLIPVisionLearnableEmbeddings",
]
