"""The zero-shot model inside a prompted one: the same weights, without the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..text import normalize
from ..towers import evaluating, image_side, text_side
from . import Prediction


ADAPTER_PARTS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@contextmanager
def without_adapters(model: nn.Module):
    """Within it, `model` computes what it would without any adapter. What is trainable stays as it was."""
    parts = [part for part in model.modules() if isinstance(part, ADAPTER_PARTS) and not part.disable_adapters]
    trainable = [(tensor, tensor.requires_grad) for part in parts for tensor in part.parameters()]
    for part in parts:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters(True)
        for tensor, requires_grad in trainable:
            tensor.requires_grad_(requires_grad)


class ZeroShotTeacher:
    """
    What a classifier predicted without its adapter.

    Class embeddings are computed once and again only when class names, templates or frozen weights have changed. They
    belong to nobody's parameters or buffers: they are neither trained nor saved.
    """

    def __init__(self) -> None:
        self._class_embeds: dict[tuple[str, ...], tuple[tuple, torch.Tensor]] = {}

    @torch.no_grad()
    def predict(self, model, templates: Sequence[str], student: Prediction, image_inputs: dict) -> Prediction:
        """
        Args:
            model: the classifier.
            templates: the class embeddings are normalised means over them.
            student: what the classifier predicts with its adapter.
            image_inputs: for `get_image_features`; not needed if the image tower has no adapter in it.
        """
        class_embeds = self._get_class_embeds(model, tuple(templates))
        image_embeds = student.image_embeds.detach()
        if any(map(_has_adapter, image_side(model))):
            with without_adapters(model), evaluating(model):
                image_embeds = model.get_image_features(**image_inputs).pooler_output  # (B, E)
        return model.predict(image_embeds, class_embeds)

    def _get_class_embeds(self, model, templates: tuple[str, ...]) -> torch.Tensor:
        key = (tuple(model.class_names), *map(_fingerprint, text_side(model)))
        if self._class_embeds.get(templates, (None,))[0] != key:
            with without_adapters(model), evaluating(model):  # a BERT has dropout
                self._class_embeds[templates] = (key, _mean_class_embeds(model, templates))
        return self._class_embeds[templates][1]


def _mean_class_embeds(model, templates) -> torch.Tensor:
    """(C, E): mean of the un-normalised embeddings over the templates, then normalised."""
    total = 0
    for template in templates:
        prompts = model.build_prompts(model.class_names, template)
        outputs = model.get_text_features(prompts.input_ids.to(model.device), prompts.attention_mask.to(model.device))
        total = total + outputs.pooler_output.to(torch.promote_types(outputs.pooler_output.dtype, torch.float32))
    return normalize(total / len(templates))


def _has_adapter(module: nn.Module) -> bool:
    return any(isinstance(part, ADAPTER_PARTS) for part in module.modules())


def _fingerprint(module: nn.Module) -> tuple:
    """Differs when a frozen weight has been exchanged, moved, cast or written to."""
    frozen = [tensor for tensor in module.parameters() if not tensor.requires_grad]
    return tuple((id(tensor), tensor._version, tensor.dtype, tensor.device) for tensor in frozen)
