"""Learnable text embeddings for a frozen CLIP, native to peft and transformers.

Importing the package registers the method with peft, so that `get_peft_model`, `PeftModel.from_pretrained` and
`CLIPModel.load_adapter` understand its adapters.
"""

from .auto import AutoPeftModelForPromptClassification
from .auto_model import AutoModelForPromptClassification
from .callbacks import GaussianPromptAveraging, StopAtNonFinite
from .checkpoints import last_whole_checkpoint
from .class_prompts import build_class_prompts, check_label_names, pad_template
from .classifier import CLIPForPromptClassification
from .families import (
    AltCLIPForPromptClassification,
    ChineseCLIPForPromptClassification,
    MetaClip2ForPromptClassification,
    Siglip2ForPromptClassification,
    SiglipForPromptClassification,
)
from .peft_model import PeftModelForPromptClassification
from .presets import PRESETS
from .prograd_trainer import ProGradMixin, ProGradTrainer
from .prompt_classification import PromptClassificationMixin
from .prompt_ensemble import description_ensemble, load_templates, template_ensemble
from .recipes import training_recipe
from .registration import register
from .tuner import CLIPPromptTuningConfig, CLIPPromptTuningModel, CLIPTextLearnableEmbeddings


__version__ = "0.1.0"

register()

__all__ = [
    "AltCLIPForPromptClassification",
    "AutoModelForPromptClassification",
    "AutoPeftModelForPromptClassification",
    "CLIPForPromptClassification",
    "ChineseCLIPForPromptClassification",
    "MetaClip2ForPromptClassification",
    "Siglip2ForPromptClassification",
    "SiglipForPromptClassification",
    "CLIPPromptTuningConfig",
    "CLIPPromptTuningModel",
    "CLIPTextLearnableEmbeddings",
    "GaussianPromptAveraging",
    "PRESETS",
    "PeftModelForPromptClassification",
    "ProGradMixin",
    "ProGradTrainer",
    "PromptClassificationMixin",
    "StopAtNonFinite",
    "build_class_prompts",
    "check_label_names",
    "description_ensemble",
    "last_whole_checkpoint",
    "load_templates",
    "pad_template",
    "template_ensemble",
    "training_recipe",
]
