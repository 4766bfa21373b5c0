"""Makes peft know the method."""

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .peft_model import PeftModelForPromptClassification
from .tuner import CLIPPromptPeftType, CLIPPromptTaskType, CLIPPromptTuningConfig, CLIPPromptTuningModel


def register() -> None:
    """Enters the method into peft's mappings.

    `peft.utils.register_peft_method` takes only names of the closed enum `PeftType`. The mappings that it fills are
    plain dicts that accept members of our own enums, so those are filled here.
    """
    method = CLIPPromptPeftType.CLIP_PROMPT_TUNING
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = CLIPPromptTuningConfig
    PEFT_TYPE_TO_TUNER_MAPPING[method] = CLIPPromptTuningModel
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = CLIPPromptTuningModel.prefix
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[CLIPPromptTaskType.PROMPT_CLASSIFICATION] = PeftModelForPromptClassification
