"""The pipeline of transformers for classifiers by class prompts, and its registration as a task."""

from __future__ import annotations

import os

from transformers import ImageClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .assets import custom_pipelines
from .auto import AutoModelForPromptClassification
from .families import CLASSIFIERS
from .modeling import PromptClassificationMixin


TASK = "prompt-image-classification"


class PromptClassificationPipeline(ImageClassificationPipeline):
    """
    The image classification pipeline for a classifier, a prompt adapter, or a saved one of either.

    Its results are those of `pipeline("image-classification", ...)`. It loads the right class for a saved classifier
    and for an adapter, and takes classifiers in memory without saying that they are not supported. After
    `import clip_prompt_peft` it is the pipeline of the task `"prompt-image-classification"`. As code beside saved
    classifiers it is that of `"image-classification"`, too, with `trust_remote_code=True`.

    Args:
        model (`PromptClassificationMixin`, `PeftModelForPromptClassification`, or a model of a family):
            The model. One of a family, such as a `CLIPModel`, becomes a classifier with the class names in its config.
        tokenizer (*optional*):
            The tokenizer for the class prompts. By default that of the model.
        kwargs:
            The arguments of `ImageClassificationPipeline`. `image_processor` is needed for a model in memory.

    Raises:
        TypeError: If the model is of another kind.

    Example:

    ```py
    >>> from transformers import pipeline
    >>> import clip_prompt_peft

    >>> classify = pipeline("prompt-image-classification", model="me/pets-prompts")
    >>> classify("cat.jpg")
    [{'label': 'cat', 'score': 0.99...}, ...]
    ```
    """

    _load_tokenizer = None  # loaded if there is one beside the model

    def __init__(self, model, tokenizer=None, **kwargs):
        super().__init__(model=_classifier(model, tokenizer), tokenizer=tokenizer, **kwargs)

    def check_model_type(self, supported_models) -> None:
        """Does nothing: the constructor takes classifiers only, which transformers' list does not have."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the model, which brings its tokenizer and pipeline along, and the image processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory, **kwargs)


def _classifier(model, tokenizer):
    """Returns the model if it classifies, and otherwise the classifier with its modules."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PeftModel
    if isinstance(inner, PromptClassificationMixin):
        return model
    if not isinstance(model, tuple(one.base_class for one in CLASSIFIERS)):
        raise TypeError(
            "PromptClassificationPipeline takes a classifier of clip_prompt_peft, a PeftModel around one, or a model "
            f"of a supported family, got a {type(inner).__name__}. Pass the classifier itself, or its folder or Hub "
            f"id with the task {TASK!r}."
        )
    # transformers leaves classes in place of their names in the config of a model that it loads for a pipeline
    model.config.custom_pipelines = custom_pipelines()
    return AutoModelForPromptClassification.from_base(model, tokenizer)


def register_task() -> None:
    """Registers the task with transformers. Called when the package is imported."""
    PIPELINE_REGISTRY.register_pipeline(
        TASK, PromptClassificationPipeline, pt_model=AutoModelForPromptClassification, type="image"
    )
