"""Writes the report: tables from the numbers, pictures drawn and embedded, one file without links to others."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import torch
from datasets import Dataset

from . import plots
from .comparison import Comparison
from .interpret import nearest_words
from .model_card import environment_versions
from .tables import printable


MAX_IMAGES = 18  # in a grid
THUMBNAIL = (128, 128)


def write_report(
    path: str | os.PathLike,
    model,
    comparison: Comparison,
    dataset: Dataset,
    title: str,
    facts: dict[str, str] | None = None,
) -> None:
    """Writes a report on an adapter as one HTML file that needs no other.

    Args:
        path: of the file.
        model: the `PeftModel` of a classifier.
        comparison: of `model`, see [`compare_with_zero_shot`].
        dataset: the images that were compared on, for the pictures.
        title: of the page.
        facts: further lines for the table at the top, such as what it was tuned on.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError('A report needs jinja2: pip install "clip_prompt_peft[report]".') from error
    environment = Environment(
        autoescape=True, finalize=lambda value: printable(value) if isinstance(value, str) else value
    )
    template = environment.from_string((files(__package__) / "report.html.j2").read_text())
    html = template.render(
        title=title,
        facts={**_facts(model, comparison), **(facts or {})},
        metrics=_metrics(comparison),
        classes=_classes(comparison),
        words=nearest_words(model),
        pictures=_pictures(model, comparison),
        grids=_grids(comparison, dataset),
        versions=environment_versions(),
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(html)


def _facts(model, comparison: Comparison) -> dict[str, str]:
    config = model.active_peft_config
    return {
        "Base model": os.path.basename(os.path.normpath(config.base_model_name_or_path or "unknown")),
        "Template": config.padded_template or config.prompt_template,
        "Vectors": f"{config.num_virtual_tokens}, started from {config.prompt_tuning_init.value}",
        "Classes": str(len(comparison.class_names)),
        "Test images": str(len(comparison.tuned.labels)),
        "Changed sides": f"{len(comparison.gained)} images gained, {len(comparison.lost)} lost",
    }


def _metrics(comparison: Comparison) -> list[tuple[str, float, float]]:
    """Name, zero-shot value, tuned value."""
    before, after = comparison.zero_shot.metrics, comparison.tuned.metrics
    return [(name.replace("_", " "), before[name], after[name]) for name in after]


def _classes(comparison: Comparison) -> list[tuple[str, int, float, float]]:
    """Name, number of images, accuracy of the zero-shot and of the tuned model."""
    rows = [
        (
            name,
            int(np.sum(comparison.tuned.labels == label)),
            comparison.zero_shot.class_accuracy(label),
            comparison.tuned.class_accuracy(label),
        )
        for label, name in enumerate(comparison.class_names)
    ]
    return [row for row in rows if not math.isnan(row[2])]


@torch.no_grad()
def _pictures(model, comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Heading, and name and address of the pictures under it."""
    names = comparison.class_names
    both = {"zero-shot": comparison.zero_shot, "tuned": comparison.tuned}
    confusion = [
        (name, _embed(plots.plot_confusion_matrix(answers.labels, answers.predicted, names)))
        for name, answers in both.items()
    ]
    reliability = [
        (name, _embed(plots.plot_reliability(answers.confidence, answers.is_correct)))
        for name, answers in both.items()
    ]
    tuned_embeds = _class_embeds(model)
    with model.disable_adapter():
        zero_shot_embeds = _class_embeds(model)
    similarity = [
        (name, _embed(plots.plot_class_similarity(embeds, names)))
        for name, embeds in (("zero-shot", zero_shot_embeds), ("tuned", tuned_embeds))
        if embeds is not None
    ]
    pictures = [("Confusion", confusion), ("Calibration", reliability), ("Similarity of classes", similarity)]
    return [(heading, drawn) for heading, drawn in pictures if drawn]


def _class_embeds(model) -> np.ndarray | None:
    """(C, E); `None` if they differ from image to image."""
    if getattr(model.prompt_layout, "image_conditioned", False):
        return None
    return model.get_class_embeds().float().cpu().numpy()


def _grids(comparison: Comparison, dataset: Dataset) -> list[tuple[str, int, str]]:
    """Heading, number of images, and address of the picture that shows some of them."""
    chosen = (
        ("Right only when tuned", comparison.gained, comparison.zero_shot),
        ("Right only before", comparison.lost, comparison.tuned),
    )
    return [
        (heading, len(indices), _embed(_grid(indices, wrong.predicted, comparison, dataset)))
        for heading, indices, wrong in chosen
        if len(indices)
    ]


def _grid(indices: Sequence[int], wrongly: np.ndarray, comparison: Comparison, dataset: Dataset):
    shown = [int(index) for index in indices[:MAX_IMAGES]]
    images = [dataset[index]["image"].convert("RGB") for index in shown]
    for image in images:
        image.thumbnail(THUMBNAIL)
    names, labels = comparison.class_names, comparison.tuned.labels
    return plots.plot_image_grid(images, [f"{names[labels[index]]}\nnot {names[wrongly[index]]}" for index in shown])


def _embed(drawn) -> str:
    buffer = io.BytesIO()
    plots.save_figure(drawn, buffer, dpi=100)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
