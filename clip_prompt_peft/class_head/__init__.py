"""Class heads as a peft method: rows of class weights, or a cache of images, in place of embeddings of prompts.

| file | content |
|---|---|
| `config.py`, `presets.py` | the configuration, and the published methods as presets of it |
| `resolve.py` | from a configuration and a classifier to the configuration that is saved |
| `heads.py` | the tensors of each kind of head, and what they do |
| `layer.py` | the layers around the classifier's `class_head` and around LayerNorms |
| `model.py` | injecting, and fitting saved tensors to the model |
"""

from .config import ClassHeadConfig
from .layer import ClassHeadLayer
from .model import ClassHeadModel


__all__ = ["ClassHeadConfig", "ClassHeadLayer", "ClassHeadModel"]
