"""The pipeline of transformers for classifiers by class prompts, and its registration as a task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image
from transformers import ImageClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .assets import custom_pipelines
from .auto import AutoModelForPromptClassification
from .families import CLASSIFIERS
from .file_contents import shown
from .image_files import UnreadableImageError, bytes_of_text, decode_image, process_images
from .modeling import PromptClassificationMixin


TASK = "prompt-image-classification"


class PromptClassificationPipeline(ImageClassificationPipeline):
    """
    The image classification pipeline for a classifier, a prompt adapter, or a saved one of either.

    Its results are those of `pipeline("image-classification", ...)`. It loads the right class for a saved classifier
    and for an adapter, and takes classifiers in memory without saying that they are not supported. After
    `import clip_prompt_peft` it is the pipeline of the task `"prompt-image-classification"`. As code beside saved
    classifiers it is that of `"image-classification"`, too, with `trust_remote_code=True`.

    Images are decoded by [`decode_image`], as in training and evaluation. An image is a path, an http(s) address, a
    base64 text, the bytes of a file, an image of Pillow, or an array or tensor of shape (H, W), (H, W, C) or
    (C, H, W). Several images are a list or a dataset. An empty list gives an empty list.

    With `coverage=0.9`, an image gets the set of classes of [`~evaluation.conformal.ConformalClassifier`], for which
    the model needs scores. An empty set means that the model does not know.

    Args:
        model (`PromptClassificationMixin`, `PeftModelForPromptClassification`, or a model of a family):
            The model. One of a family, such as a `CLIPModel`, becomes a classifier with the class names in its config.
        tokenizer (*optional*):
            The tokenizer for the class prompts. By default that of the model.
        kwargs:
            The arguments of `ImageClassificationPipeline`. `image_processor` is needed for a model in memory.

    Raises:
        TypeError: If the model, or an image, is of another kind.
        UnreadableImageError: If an image is missing, damaged, cannot be fetched, or has values of an unknown range.

    Example:

    ```py
    >>> from transformers import pipeline
    >>> import clip_prompt_peft

    >>> classify = pipeline("prompt-image-classification", model="me/pets-prompts")
    >>> classify("cat.jpg")
    [{'label': 'cat', 'score': 0.99...}, ...]
    ```
    """

    _conformal: Any = None  # a `ConformalClassifier`, once a coverage is asked for
    _load_tokenizer = None  # loaded if there is one beside the model

    def __init__(self, model, tokenizer=None, **kwargs):
        super().__init__(model=_classifier(model, tokenizer), tokenizer=tokenizer, **kwargs)

    def check_model_type(self, supported_models) -> None:
        """Does nothing: the constructor takes classifiers only, which transformers' list does not have."""

    def __call__(self, inputs=None, **kwargs):
        inputs = kwargs.pop("images", inputs)  # the former name
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, coverage=None, **pipeline_parameters):  # type: ignore[override]
        """Returns the arguments of each step. transformers calls it with those of a call."""
        preprocess, forward, postprocess = super()._sanitize_parameters(**pipeline_parameters)
        if coverage is not None:
            _check_no_others(postprocess)
            postprocess["coverage"] = coverage
            self._check_coverage(coverage)
        return preprocess, forward, postprocess

    def _check_coverage(self, coverage: float) -> None:
        from .evaluation.conformal import ConformalClassifier  # which imports `datasets`

        if self._conformal is None:
            model: Any = self.model
            self._conformal = ConformalClassifier(model, self.image_processor)
        if (told := self._conformal.check().too_few(coverage)) is not None:
            warnings.warn(told, UserWarning, stacklevel=4)

    def postprocess(self, model_outputs, *args, coverage: float | None = None, **kwargs):  # type: ignore[override]
        """Returns labels and scores of an image; with `coverage`, those in its set, which may be empty."""
        if coverage is None:
            return super().postprocess(model_outputs, *args, **kwargs)
        _check_no_others(kwargs)  # of the call, if the coverage is that of the pipeline
        sets = self._conformal.sets_of(model_outputs["logits"], coverage)
        (names,), (labels,), (probabilities,) = sets.names, sets.labels, sets.probabilities
        return [{"label": name, "score": float(probabilities[label])} for name, label in zip(names, labels)]

    def preprocess(self, image, timeout: float | None = None):  # type: ignore[override]  # as the class above has it
        """Returns what the model takes of one image."""
        inputs = process_images(self.image_processor, [_decode(image, timeout)])
        return inputs.to(self.dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the model, which brings its tokenizer and pipeline along, and the image processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory, **kwargs)


def _check_no_others(arguments: Mapping) -> None:
    if arguments:
        raise ValueError("With coverage, the answer is a set of any size; leave out top_k and function_to_apply.")


def _decode(image, timeout: float | None) -> Image.Image:
    """Decodes what transformers' pipelines take as an image, and paths, bytes, arrays and tensors."""
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.is_floating_point() else image).numpy(force=True)
    if isinstance(image, str):
        return _decode_text(image, timeout)
    if not isinstance(image, (os.PathLike, bytes, Image.Image, np.ndarray)):
        raise TypeError(
            "Expected an image as a path, an http(s) address, a base64 text, bytes, an image of Pillow, an array or a "
            f"tensor; got a {type(image).__name__}."
        )
    return decode_image(image)


def _decode_text(text: str, timeout: float | None) -> Image.Image:
    """Decodes an address, a path or a base64 text, told apart as by transformers."""
    name = shown(text)
    if text.startswith(("http://", "https://")):
        try:
            with urlopen(text, timeout=timeout) as response:
                content = response.read()
        except Exception as error:  # invalid addresses raise errors of other types than connections
            raise UnreadableImageError(
                f"Cannot read {name}: it cannot be fetched ({type(error).__name__}: {error}). Download it first."
            ) from error
        return decode_image(content, name)
    if os.path.exists(text) or (content := bytes_of_text(text)) is None:
        return decode_image(text, name)
    return decode_image(content, f"the base64 text {name}")


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
