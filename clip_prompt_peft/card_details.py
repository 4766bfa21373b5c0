"""What a model card says about the data, the training and the results of an adapter, if one tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard

from .environment import environment_versions
from .markdown import inline_code, table, table_cell


if TYPE_CHECKING:  # importing the package is not to load `datasets` and `evaluate`
    from .comparison import Comparison
    from .interpret import NearestWords


NUM_CLASSES_SHOWN, NUM_VECTORS_SHOWN = 50, 16
LOWER_IS_BETTER = ("expected_calibration_error",)


@dataclass(frozen=True)
class TrainingData:
    """
    What an adapter was tuned on.

    Attributes:
        name: of the data set.
        hub_id: of it, if it is on the Hub.
        num_images: that were trained on.
        shots: images per class; `None` if all there are.
        seed: of the draw.
        content_hash: see [`~data.content_hash`].
    """

    name: str
    num_images: int
    hub_id: str | None = None
    shots: int | None = None
    seed: int | None = None
    content_hash: str | None = None


@dataclass(frozen=True)
class CardDetails:
    """
    What goes into the model card beside what the adapter itself knows.

    Attributes:
        data: that was trained on.
        settings: of the training, by name.
        test_name: what was tested on: a split of the data, or other data.
        comparison: with the zero-shot model, on the test images.
        words: nearest to the vectors, see [`nearest_words`].
    """

    data: TrainingData | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    test_name: str = "test"
    comparison: Comparison | None = None
    words: Sequence[NearestWords] = ()


def details_section(details: CardDetails) -> list[str]:
    """The lines of the section."""
    lines = []
    if details.data is not None:
        lines += ["", "### Training", "", *_data_lines(details.data)]
        lines += [f"- {name}: {inline_code(str(value))}" for name, value in details.settings.items()]
    if details.comparison is not None:
        lines += ["", f"### Results on {inline_code(details.test_name)}", "", *_results(details.comparison)]
    if details.words:
        lines += ["", "### Words next to the vectors", "", *_words(details.words)]
    versions = ", ".join(f"{name} {version}" for name, version in environment_versions().items())
    return [*lines, "", f"Made with {versions}."]


def add_metadata(card: ModelCard, details: CardDetails, model_name: str) -> None:
    """The results in the form that the Hub reads (`model-index`); results on other data that are there stay."""
    data = details.data
    if data is not None and data.hub_id and data.hub_id not in (card.data.datasets or []):
        card.data.datasets = [*(card.data.datasets or []), data.hub_id]
    if details.comparison is None:
        return
    name = data.name if data is not None else details.test_name
    dataset_type = (data.hub_id if data is not None else None) or name
    same = (dataset_type, details.test_name)
    results = card.data.eval_results or []
    others = [result for result in results if (result.dataset_type, result.dataset_split) != same]
    card.data.model_name = model_name
    card.data.eval_results = others + [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset_type,
            dataset_name=name,
            dataset_split=details.test_name,
            metric_type=metric,
            metric_value=round(value, 4),
            metric_name=f"{metric.replace('_', ' ')}, {kind}",
        )
        for kind, answers in (("tuned", details.comparison.tuned), ("zero-shot", details.comparison.zero_shot))
        for metric, value in answers.metrics.items()
    ]


def _data_lines(data: TrainingData) -> list[str]:
    facts = {
        "Data set": data.hub_id or data.name,
        "Images": data.num_images,
        "Shots": data.shots,
        "Seed": data.seed,
        "Hash of images and labels": data.content_hash,
    }
    return [f"- {name}: {inline_code(str(value))}" for name, value in facts.items() if value is not None]


def _results(comparison: Comparison) -> list[str]:
    before, after = comparison.zero_shot.metrics, comparison.tuned.metrics
    rows = [
        [
            name.replace("_", " ") + (" (lower is better)" if name in LOWER_IS_BETTER else ""),
            f"{before[name]:.4f}",
            f"{after[name]:.4f}",
        ]
        for name in after
    ]
    lines = table(["metric", "zero-shot", "tuned"], rows)
    gained, lost = len(comparison.gained), len(comparison.lost)
    lines += ["", f"{gained} of {len(comparison.tuned.labels)} images were gained, {lost} lost."]
    classes = [
        [
            table_cell(name),
            str(int((comparison.tuned.labels == label).sum())),
            f"{comparison.zero_shot.class_accuracy(label):.2f}",
            f"{comparison.tuned.class_accuracy(label):.2f}",
        ]
        for label, name in enumerate(comparison.class_names[:NUM_CLASSES_SHOWN])
    ]
    return [*lines, "", *table(["class", "images", "accuracy, zero-shot", "accuracy, tuned"], classes)]


def _words(words: Sequence[NearestWords]) -> list[str]:
    rows = [
        [
            str(entry.position) + (f" of {table_cell(entry.class_name)}" if entry.class_name else ""),
            table_cell(entry.replaced),
            ", ".join(f"{table_cell(word)} {distance:.2f}" for word, distance in zip(entry.words, entry.distances)),
        ]
        for entry in words[:NUM_VECTORS_SHOWN]
    ]
    far = sum(entry.distances[0] > entry.typical_distance for entry in words)
    return [
        *table(["position", "in place of", "nearest words, distance"], rows),
        "",
        f"From a word to its nearest other word it is typically {words[0].typical_distance:.2f}: {far} of "
        f"{len(words)} vectors are farther than that from every word, and what words are nearest to them says little.",
    ]
