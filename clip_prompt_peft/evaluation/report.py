"""Writes an evaluation report as a single HTML file with embedded plots."""

from __future__ import annotations

import base64
import io
import os
from importlib.resources import files

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from ..class_head import ClassHeadConfig
from ..data.reading import readable
from ..installing import how_to_install
from ..modeling import classifier_in
from . import plots
from .comparison import Answers, Comparison
from .interpret import nearest_words
from .model_card import environment_versions
from .tables import printable


MAX_IMAGES = 18  # in a grid
MAX_PAIRS, MAX_IMAGES_OF_PAIR = 5, 6
THUMBNAIL = (128, 128)


def write_report(
    path: str | os.PathLike,
    model: PeftModel,
    comparison: Comparison,
    dataset: Dataset,
    title: str,
    facts: dict[str, str] | None = None,
) -> None:
    """Writes a report on an adapter as one self-contained HTML file.

    Args:
        path (`str` or `os.PathLike`):
            The file to write.
        model (`PeftModel`):
            A classifier with an adapter.
        comparison (`Comparison`):
            The result of [`compare_with_zero_shot`] for `model`.
        dataset (`Dataset`):
            The images of the comparison, some of which are shown.
        title (`str`):
            The title of the page.
        facts (`dict[str, str]`, *optional*):
            Additional rows for the table at the top, such as the training data.

    Raises:
        ImportError: If matplotlib or jinja2 is missing.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError(f"A report needs jinja2; {how_to_install('report')}.") from error
    environment = Environment(
        autoescape=True, finalize=lambda value: printable(value) if isinstance(value, str) else value
    )
    template = environment.from_string((files(__package__) / "report.html.j2").read_text())
    html = template.render(
        title=title,
        facts={**_facts(model, comparison), **(facts or {})},
        metrics=comparison.metric_rows(),
        classes=comparison.class_rows(),
        calibration=comparison.calibration_errors(),
        sets=comparison.coverage_rows(classifier_in(model, "A report").conformal_scores),
        pairs=_pairs(comparison, dataset),
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
        **_facts_of_adapter(config),
        **({} if comparison.temperature is None else {"Temperature": f"{comparison.temperature:.4g}"}),
        "Classes": str(len(comparison.class_names)),
        "Test images": str(len(comparison.tuned.labels)),
        "Changed predictions": f"{len(comparison.gained)} images gained, {len(comparison.lost)} lost",
    }


def _facts_of_adapter(config) -> dict[str, str]:
    if isinstance(config, ClassHeadConfig):
        kind = f"{config.num_keys} images of a cache" if config.head_type == "cache" else "a row for each class"
        tuned = "" if config.target_modules is None else ", LayerNorms tuned beside it"
        return {"Template": ", ".join(config.templates), "Class head": kind + tuned}
    return {
        "Template": config.padded_template or config.prompt_template,
        "Vectors": f"{config.num_virtual_tokens}, initialized from {config.prompt_tuning_init.value}",
    }


@torch.no_grad()
def _pictures(model, comparison: Comparison) -> dict[str, dict[str, str]]:
    """Returns the embedded plots by heading and caption."""
    names = comparison.class_names
    both = {"zero-shot": comparison.zero_shot, "tuned": comparison.tuned}
    with model.disable_adapter():
        embeds = {"zero-shot": model.get_class_embeds()}  # (C, E)
    if not getattr(model.prompt_layout, "image_conditioned", False):  # else they depend on the image
        embeds["tuned"] = model.get_class_embeds()
    drawn = {
        "Confusion": {
            kind: plots.plot_confusion_matrix(answers.labels, answers.predicted, names)
            for kind, answers in both.items()
        },
        "Calibration": {
            kind: plots.plot_reliability(answers.confidence, answers.is_correct)
            for kind, answers in {**both, "tuned, without the temperature": comparison.uncalibrated}.items()
            if answers is not None
        },
        "Similarity of classes": {
            kind: plots.plot_class_similarity(of_kind.float().cpu().numpy(), names) for kind, of_kind in embeds.items()
        },
    }
    return {heading: {kind: _embed(axes) for kind, axes in by_kind.items()} for heading, by_kind in drawn.items()}


def _grids(comparison: Comparison, dataset: Dataset) -> list[tuple[str, int, int, str]]:
    """Returns the heading, number of images, number of those that are shown, and picture of each group of images."""
    tuned, zero_shot = comparison.tuned, comparison.zero_shot
    groups = (
        ("Still wrong when tuned, the most confident first", comparison.wrong, tuned),
        ("Only correct when tuned", comparison.gained, zero_shot),
        ("Only correct zero-shot", comparison.lost, tuned),
    )
    return [
        (heading, len(indices), len(shown), _embed(_grid(shown, comparison, dataset, answers)))
        for heading, indices, answers in groups
        if len(shown := indices[:MAX_IMAGES])
    ]


def _pairs(comparison: Comparison, dataset: Dataset) -> list[tuple[str, str, int, int, str]]:
    """Returns the true and the predicted class of confused images, their number, that of the class, and a picture."""
    tuned = comparison.tuned
    return [
        (true, predicted, len(of_pair), count, _embed(_grid(of_pair[:MAX_IMAGES_OF_PAIR], comparison, dataset, tuned)))
        for true, predicted, count, of_pair in comparison.confused_pairs()[:MAX_PAIRS]
    ]


def _grid(indices: np.ndarray, comparison: Comparison, dataset: Dataset, answers: Answers):
    """Draws images with their class and the wrong class of the answers."""
    wrong = answers.predicted
    columns, read = readable(dataset.select(indices.tolist()))
    images, _ = read(columns["image"], None)
    for image in images:
        image.thumbnail(THUMBNAIL)
    names, labels = comparison.class_names, comparison.tuned.labels
    return plots.plot_image_grid(images, [f"{names[labels[index]]}\nnot {names[wrong[index]]}" for index in indices])


def _embed(drawn) -> str:
    """Returns axes or a figure as a data URL."""
    buffer = io.BytesIO()
    plots.save_figure(drawn, buffer, dpi=100)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
