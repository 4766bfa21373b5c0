"""One batch whose images belong to different adapters.

Shapes: `B` images, `C` classes, `E` projection size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.modeling_outputs import ImageClassifierOutput

from .dual_encoder import image_side
from .prompt_classification import PromptClassificationMixin
from .tuner import CLIPPromptTuningConfig


BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


def mixed_batch_forward(
    model: PeftModel,
    adapter_names: Sequence[str],
    pixel_values: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    **image_inputs,
) -> ImageClassifierOutput:
    """Scores every image against the classes of its own adapter, as `adapter_names` does for LoRA in peft.

    All images go through the image tower together, unless there are prompts (or `modules_to_save`) in the image tower
    as well: then those of one adapter do. Which adapter is active stays as it is.

    Args:
        model: a prompt-tuned classifier, in eval mode.
        adapter_names: B names of loaded prompt adapters, or `"__base__"` for the model without prompts.
        pixel_values, image_embeds, image_inputs: as for the classifier.

    Returns:
        `ImageClassifierOutput` whose `logits` are (B, C) where all images have the same classes, otherwise a list of B
        tensors (C of that adapter,).

    Raises:
        TypeError: names that are not a list of strings; a base model that is no classifier.
        ValueError: unknown names, or another number of them than there are images; training mode; merged adapters.
    """
    classifier = model.get_base_model()
    images = pixel_values if pixel_values is not None else image_embeds
    image_inputs["pixel_values"] = pixel_values
    _check_model(model, classifier)
    _check_names(model, adapter_names, images)
    if image_embeds is None and not _image_tower_is_tuned(model, classifier):
        image_embeds, image_inputs = classifier.get_image_features(**image_inputs).pooler_output, {}  # (B, E)
    logits: list[torch.Tensor] = [None] * len(adapter_names)
    class_lists = []
    for name, rows in _rows_by_name(adapter_names).items():
        with _only(model, name):
            output = classifier(**_rows_of({"image_embeds": image_embeds, **image_inputs}, rows))
            class_lists.append(classifier.class_names)
        for row, of_image in zip(rows, output.logits):  # of_image: (C,)
            logits[row] = of_image
    same_classes = all(names == class_lists[0] for names in class_lists)
    return ImageClassifierOutput(logits=torch.stack(logits) if same_classes else logits)


def _check_model(model, classifier) -> None:
    if not isinstance(classifier, PromptClassificationMixin):
        raise TypeError(
            f"adapter_names is for images that are scored against class names, but the base model is a "
            f"{type(classifier).__name__}; make it a classifier (AutoModelForPromptClassification.from_base), or "
            "switch with set_adapter."
        )
    if model.training:
        raise ValueError("adapter_names is for inference, but the model is in training mode; call model.eval() first.")
    merged = {name for layer in _tuner_layers(model, classifier) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"adapter_names cannot be used while adapters are merged ({sorted(merged)}); call unmerge_adapter() first."
        )


def _check_names(model, adapter_names, images) -> None:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list with one name for each image, got {adapter_names!r}.")
    loaded = [name for name, config in model.peft_config.items() if isinstance(config, CLIPPromptTuningConfig)]
    unknown = sorted({*adapter_names} - {*loaded, BASE})
    if unknown:
        raise ValueError(
            f"There is no prompt adapter {unknown[0]!r}; loaded are {sorted(loaded)}, and {BASE!r} stands for none."
        )
    if images is None:
        raise ValueError("Give either pixel_values or image_embeds, got neither.")
    if len(adapter_names) != len(images):
        raise ValueError(
            f"adapter_names must name one adapter for each image, got {len(adapter_names)} names for {len(images)} "
            "images."
        )
    if not len(images):
        raise ValueError("The batch is empty; give at least one image.")


def _rows_by_name(adapter_names: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name, []).append(row)
    return rows


def _rows_of(inputs: dict, rows: list[int]) -> dict:
    """Of tensors those rows, of settings what they are."""
    return {name: value[rows] if torch.is_tensor(value) else value for name, value in inputs.items()}


def _tuner_layers(model: PeftModel, part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    layer_class = model.base_model.tuner_layer_cls
    return (module for module in part.modules() if isinstance(module, layer_class))


def _image_tower_is_tuned(model: PeftModel, classifier: PromptClassificationMixin) -> bool:
    for part in image_side(classifier):
        saved = any(isinstance(module, AuxiliaryTrainingWrapper) for module in part.modules())
        if saved or any(_tuner_layers(model, part)):
            return True
    return False


@contextmanager
def _only(model: PeftModel, name: str) -> Iterator[None]:
    """Makes one adapter the active one for a while; under a name that no layer has, the model is the base model."""
    tuner = model.base_model
    active = tuner.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]  # set_adapter changes that
    tuner.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(active, inference_mode=True)
        for parameter in trainable:
            parameter.requires_grad_(True)
