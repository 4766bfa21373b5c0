"""Prompt tuning of CLIP as a peft method, with the files that every method of peft has.

| file | content |
|---|---|
| `base_config.py`, `base_model.py` | what all adapters of this package have in common: configuration, base model |
| `config.py`, `presets.py` | the configuration, and the published methods as presets of it |
| `layout.py` | from the configuration and a model to the positions of the vectors |
| `base_layer.py` | the base class of all layers |
| `layer.py` | vectors in the text (CoOp), also conditioned on the image (CoCoOp) |
| `vectors.py` | vectors in deeper layers and in the image tower (VPT, IVLP), mapped from text vectors (MaPLe) |
| `projection.py` | a projector behind the image tower, and class embeddings of a teacher (PromptKD) |
| `tensors.py` | new tensors of an adapter |
| `model.py` | injecting, merging, and fitting saved tensors to the model |
| `files.py` | reading and checking the files of an adapter |
| `hub.py` | where the base model came from, and with which token, revision, cache, ... |
| `fingerprint.py` | some values of the base model, to tell another one of the same shape |
| `token_ids.py` | the token ids of the adapter's texts, to tell another tokenizer |
"""

from .base_config import ClassifierAdapterConfig, CLIPPromptPeftType, CLIPPromptTaskType
from .config import CLIPPromptTuningConfig
from .layer import CLIPTextLearnableEmbeddings
from .model import CLIPPromptTuningModel
from .projection import CLIPProjectedImages, CLIPTeacherClasses
from .vectors import CLIPDeepPrompts, CLIPVisionLearnableEmbeddings


__all__ = [
    "CLIPDeepPrompts",
    "CLIPPromptPeftType",
    "CLIPPromptTaskType",
    "CLIPPromptTuningConfig",
    "CLIPPromptTuningModel",
    "CLIPProjectedImages",
    "CLIPTeacherClasses",
    "CLIPTextLearnableEmbeddings",
    "CLIPVisionLearnableEmbeddings",
    "ClassifierAdapterConfig",
]
