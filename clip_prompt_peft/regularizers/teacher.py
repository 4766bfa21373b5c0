"""The teacher of regularizers: the zero-shot model, with the same weights and without the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..text import normalize
from ..text.cache import Memo, WeightsState
from ..text.chunks import autocast_state
from ..text.packing import attention_of
from ..text.prompts import ClassPrompts
from ..towers import ADAPTER_LAYERS, eval_mode, execution_device, has_adapters, image_side, text_side
from ..tuner.base_layer import CLIPPromptLayer, without_prompts
from .base import Prediction


@contextmanager
def without_adapters(model: nn.Module):
    """Disables all adapters in a model for a while. Which parameters are trainable stays the same."""
    # Layers of prompts are not switched, since other threads may use them and torch.func forbids it. A compiled graph
    # cannot read the context variable, though.
    layers = [part for part in model.modules() if isinstance(part, ADAPTER_LAYERS) and not part.disable_adapters]
    if not torch.compiler.is_compiling():
        layers = [layer for layer in layers if not isinstance(layer, CLIPPromptLayer)]
    trainable = [(tensor, tensor.requires_grad) for layer in layers for tensor in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with nullcontext() if torch.compiler.is_compiling() else without_prompts():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for tensor, requires_grad in trainable:
            tensor.requires_grad_(requires_grad)


class ZeroShotTeacher:
    """
    Predicts what a classifier would predict without its adapter.

    The class embeddings are computed once, and again only if class names, templates or frozen weights have changed.
    They are no parameters or buffers, so they are neither trained nor saved.
    """

    def __init__(self) -> None:
        self._class_embeds: dict[tuple[str, ...], Memo] = {}
        self._for_export: dict[tuple[str, ...], tuple[list[ClassPrompts], torch.Tensor]] = {}

    @torch.no_grad()
    def class_embeds(self, model, templates: Sequence[str]) -> torch.Tensor:
        """Returns the zero-shot embeddings (C, E) of the model's classes, averaged over templates, L2-normalized."""
        templates = tuple(templates)
        if not torch.compiler.is_exporting():
            return self._remembered(model, templates)
        # Where torch.export runs the model (strict=False), its weights are stand-ins without values, so that the
        # embeddings have to be computed in the graph.
        prompts, embeds = self._for_export[templates]
        return embeds if torch.compiler.is_dynamo_compiling() else _mean_class_embeds(model, prompts)

    @torch.no_grad()
    def prepare_to_export(self, model, templates: Sequence[str]) -> None:
        """Makes what `class_embeds` needs in a trace, which can neither make prompts nor compare weights by value."""
        templates = tuple(templates)
        self._for_export[templates] = _prompts(model, templates), self._remembered(model, templates)

    def _remembered(self, model, templates: tuple[str, ...]) -> torch.Tensor:
        memo = self._class_embeds.setdefault(templates, Memo())
        settings = attention_of(model.text_model), autocast_state(execution_device(model.text_model))
        key = tuple(model.class_names), WeightsState(text_side(model), with_adapters=False), settings
        return memo.get(key, lambda: _mean_class_embeds(model, _prompts(model, templates)))

    @torch.no_grad()
    def predict(self, model, templates: Sequence[str], student: Prediction, image_inputs: dict) -> Prediction:
        """Returns the prediction of the teacher for a batch.

        Args:
            model (`PromptClassificationMixin`):
                The classifier.
            templates (`Sequence[str]`):
                The templates over which class embeddings are averaged.
            student (`Prediction`):
                The prediction with the adapter.
            image_inputs (`dict`):
                The arguments of `get_image_features`. They are only needed if an adapter changes the image tower.
        """
        class_embeds = self.class_embeds(model, templates)
        image_embeds = student.image_embeds.detach()
        if has_adapters(image_side(model)):
            with without_adapters(model), eval_mode(model):
                image_embeds = model.get_image_features(**image_inputs).pooler_output  # (B, E)
        return model.predict(image_embeds, class_embeds)


def _prompts(model, templates: Sequence[str]) -> list[ClassPrompts]:
    return [model.build_prompts(model.class_names, template) for template in templates]


def _mean_class_embeds(model, prompts: Sequence[ClassPrompts]) -> torch.Tensor:
    """Returns (C, E): the mean of the embeddings over the templates, normalized afterwards."""
    total, device = 0, execution_device(model.text_model)
    with without_adapters(model), eval_mode(model):  # eval mode, since a BERT has dropout
        for of_template in prompts:
            inputs = of_template.input_ids.to(device), of_template.attention_mask.to(device)
            embeds = model.get_text_features(*inputs).pooler_output
            total = total + embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return normalize(total / len(prompts))
