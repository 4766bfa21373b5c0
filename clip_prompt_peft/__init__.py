"""Learnable text embeddings for a frozen CLIP, as a method of peft and a classifier of transformers.

Importing the package registers the method with peft, so that `get_peft_model`, `PeftModel.from_pretrained` and
`CLIPModel.load_adapter` support its adapters, and the task "prompt-image-classification" for `transformers.pipeline`.
The modules `data`, `evaluation`, `export`, `protocols` and `training` are imported when they are first used.
"""

from importlib import import_module

from .assets import load_templates
from .auto import AutoModelForPromptClassification, AutoPeftModelForPromptClassification
from .class_head import ClassHeadConfig, ClassHeadModel
from .evaluation.ensembles import description_ensemble, template_ensemble
from .families import (
    Aimv2ForPromptClassification,
    AltCLIPForPromptClassification,
    ChineseCLIPForPromptClassification,
    CLIPForPromptClassification,
    GroupViTForPromptClassification,
    MetaClip2ForPromptClassification,
    Siglip2ForPromptClassification,
    SiglipForPromptClassification,
)
from .known_checkpoints import KnownCheckpoint, known_checkpoints
from .modeling import PromptClassificationMixin
from .peft_model import PeftModelForPromptClassification, register
from .pipelines import PromptClassificationPipeline, register_task
from .templates import check_label_names, pad_template
from .text.prompts import build_class_prompts
from .training.callbacks import GaussianPromptAveraging, StopAtNonFinite
from .training.checkpoints import last_whole_checkpoint
from .training.configs import method_config
from .training.distillation import DistillationTrainer, distillation_loss
from .training.dynamic_adapter import DynamicAdapter
from .training.heads import TwoStageTuning, fit_class_head, start_class_head
from .training.prograd import ProGradMixin, ProGradTrainer
from .training.recipes import training_recipe
from .training.test_time import TestTimeTuner
from .tuner import CLIPPromptTuningConfig, CLIPPromptTuningModel, CLIPTextLearnableEmbeddings
from .tuner.hub import load_image_processor
from .tuner.presets import PRESETS


__version__ = "0.1.0"

register()
register_task()

__all__ = [
    "Aimv2ForPromptClassification",
    "AltCLIPForPromptClassification",
    "AutoModelForPromptClassification",
    "AutoPeftModelForPromptClassification",
    "CLIPForPromptClassification",
    "ChineseCLIPForPromptClassification",
    "GroupViTForPromptClassification",
    "MetaClip2ForPromptClassification",
    "Siglip2ForPromptClassification",
    "SiglipForPromptClassification",
    "CLIPPromptTuningConfig",
    "CLIPPromptTuningModel",
    "CLIPTextLearnableEmbeddings",
    "ClassHeadConfig",
    "ClassHeadModel",
    "DistillationTrainer",
    "DynamicAdapter",
    "GaussianPromptAveraging",
    "KnownCheckpoint",
    "PRESETS",
    "PeftModelForPromptClassification",
    "ProGradMixin",
    "ProGradTrainer",
    "PromptClassificationMixin",
    "PromptClassificationPipeline",
    "StopAtNonFinite",
    "TwoStageTuning",
    "TestTimeTuner",
    "build_class_prompts",
    "check_label_names",
    "description_ensemble",
    "distillation_loss",
    "fit_class_head",
    "known_checkpoints",
    "last_whole_checkpoint",
    "load_image_processor",
    "load_templates",
    "method_config",
    "pad_template",
    "start_class_head",
    "template_ensemble",
    "training_recipe",
]

PUBLIC_MODULES = ("data", "evaluation", "export", "protocols", "training")


def __getattr__(name: str):
    if name in PUBLIC_MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public, for completion in editors and notebooks."""
    return sorted({*__all__, *PUBLIC_MODULES, *(name for name in globals() if name.startswith("__"))})
