"""Learnable text embeddings for a frozen CLIP, as a method of peft and a classifier of transformers.

Importing the package registers the method with peft, so that `get_peft_model`, `PeftModel.from_pretrained` and
`CLIPModel.load_adapter` support its adapters, and the task "prompt-image-classification" for `transformers.pipeline`.
"""

from .assets import load_templates
from .auto import AutoModelForPromptClassification, AutoPeftModelForPromptClassification
from .evaluation.ensembles import description_ensemble, template_ensemble
from .families import (
    AltCLIPForPromptClassification,
    ChineseCLIPForPromptClassification,
    CLIPForPromptClassification,
    MetaClip2ForPromptClassification,
    Siglip2ForPromptClassification,
    SiglipForPromptClassification,
)
from .modeling import PromptClassificationMixin
from .peft_model import PeftModelForPromptClassification, register
from .pipelines import PromptClassificationPipeline, register_task
from .templates import check_label_names, pad_template
from .text.prompts import build_class_prompts
from .training.callbacks import GaussianPromptAveraging, StopAtNonFinite
from .training.checkpoints import last_whole_checkpoint
from .training.prograd import ProGradMixin, ProGradTrainer
from .training.recipes import training_recipe
from .tuner import CLIPPromptTuningConfig, CLIPPromptTuningModel, CLIPTextLearnableEmbeddings
from .tuner.presets import PRESETS


__version__ = "0.1.0"

register()
register_task()

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
    "PromptClassificationPipeline",
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
