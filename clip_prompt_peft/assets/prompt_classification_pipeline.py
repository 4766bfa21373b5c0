"""The image classification pipeline of this folder, whose classifier compares images with texts about its classes.

`save_pretrained` of clip_prompt_peft writes this file beside a classifier, and `custom_pipelines` in config.json names
it. Without it, `pipeline("image-classification", ...)` would put a new layer on the image tower, which was never
trained, and give the right class names for answers at random.
"""

try:
    from clip_prompt_peft import PromptClassificationPipeline
except ImportError as error:
    raise ImportError(
        "This classifier runs with the package clip_prompt_peft in a version that has PromptClassificationPipeline, "
        f"which could not be imported ({error}). Install it into this environment, or update it: in a clone of "
        "clip_prompt_peft, pip install -e ."
    ) from error

__all__ = ["PromptClassificationPipeline"]
