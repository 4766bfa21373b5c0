"""How the command `predict` adapts to its images at test time, for `--test_time`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from ..data.views import RandomViews
from ..image_files import process_images
from ..peft_model import PeftModelForPromptClassification
from ..training.dynamic_adapter import DynamicAdapter
from ..training.test_time import TestTimeTuner


TDA = "tda"


def adapted(
    kind: str, model: PeftModelForPromptClassification, image_processor
) -> Callable[[Sequence[Image.Image]], torch.Tensor]:
    """Returns a function from B images to their logits (B, C), which adapts to the images. The views are always the
    same for the same images.

    Args:
        kind (`str`):
            An objective of [`TestTimeTuner`], or `"tda"`.
        model (`PeftModelForPromptClassification`):
            The classifier, in eval mode.
        image_processor (`BaseImageProcessor`):
            Its image processor.

    Raises:
        ValueError: If the classifier cannot be adapted that way.
    """
    if model.get_base_model().temperature is not None:
        print("The temperature of the adapter is for answers without --test_time and is not applied.", file=sys.stderr)
    if kind != TDA:
        tuner = TestTimeTuner(model, kind, RandomViews(image_processor, generator=torch.Generator().manual_seed(0)))
        tuner.check()
        return lambda images: tuner(list(images)).logits
    adapter, classifier = DynamicAdapter.of(model), model.get_base_model()

    @torch.no_grad()
    def classify(images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = process_images(image_processor, list(images)).to(model.device)
        return adapter(classifier.image_head(classifier.get_image_features(**inputs).pooler_output)).logits

    return classify
