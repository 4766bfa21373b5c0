"""The versions that results were made with."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard

from .tables import inline_code, table, table_cell


if TYPE_CHECKING:  # importing the package is not to load `datasets` and `evaluate`
    from .comparison import Comparison
    from .interpret import NearestWords
import os
import re

from huggingface_hub.utils import HFValidationError, validate_repo_id


PACKAGES = ("clip_prompt_peft", "peft", "transformers", "torch", "datasets")


def environment_versions() -> dict[str, str]:
    """Python and the packages that matter, by name; those that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


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


BEGIN, END = "<!-- clip_prompt_peft: begin -->", "<!-- clip_prompt_peft: end -->"


BASE_TAG = "base_model:adapter:"  # how peft, and the Hub, tag an adapter with its base model


NUM_CLASSES_SHOWN = 50


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id, and is not a folder of this machine."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def empty_card() -> ModelCard:
    """A card without text."""
    return ModelCard("---\nlibrary_name: peft\n---\n")


def add_prompt_section(
    card: ModelCard,
    config,
    metrics: Mapping[str, float] | None = None,
    repo_id: str | None = None,
    details: CardDetails | None = None,
) -> None:
    """Adds, or replaces, what the card says about the prompts: base model, classes, template, how to load it.

    Args:
        card: the card to change.
        config: the adapter's [`CLIPPromptTuningConfig`].
        metrics: results by name.
        repo_id: where the adapter is pushed to, if that is known.
        details: of data, training and results.
    """
    card.data["library_name"] = "peft"
    card.data["pipeline_tag"] = "image-classification"
    tags = {tag for tag in card.data.get("tags") or [] if not tag.startswith(BASE_TAG)}
    if is_hub_id(config.base_model_name_or_path):
        card.data["base_model"] = config.base_model_name_or_path
        tags.add(BASE_TAG + config.base_model_name_or_path)
    else:  # peft writes the path of a local folder, which is not a valid model id
        card.data.base_model = None
    card.data["tags"] = sorted({*tags, "clip", "prompt-tuning", "clip_prompt_peft"})
    if details is not None:
        add_metadata(card, details, model_name=repo_id or "CLIP prompts")
    section = f"{BEGIN}\n{_section(config, metrics, repo_id, details)}\n{END}"
    if BEGIN in card.text:
        pattern = re.escape(BEGIN) + ".*" + re.escape(END)  # to the last: a class may be named like the marker
        card.text = re.sub(pattern, lambda _: section, card.text, flags=re.DOTALL)
    else:
        card.text = f"{section}\n\n{card.text.strip()}\n"


def _section(config, metrics, repo_id, details) -> str:
    names = config.class_names or []
    shown = ", ".join(inline_code(name) for name in names[:NUM_CLASSES_SHOWN])
    if len(names) > NUM_CLASSES_SHOWN:
        shown += f", ... ({len(names) - NUM_CLASSES_SHOWN} more)"
    lines = [
        "## Learned prompts for CLIP",
        "",
        f"- Base model: {_base_model(config.base_model_name_or_path)}{_revision(config)}",
        f"- Vectors: {_text_vectors(config)}",
        *_other_prompts(config),
        f"- Template: {inline_code(config.padded_template or config.prompt_template)}",
        f"- Initialised from: {config.prompt_tuning_init.value}",
        f"- Classes ({len(names)}): {shown or 'none saved'}",
    ]
    if metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {table_cell(name)} | {value:.4g} |" for name, value in metrics.items()]
    if details is not None:
        lines += details_section(details)
    return "\n".join([*lines, "", *_snippet(repo_id)])


def _text_vectors(config) -> str:
    if not config.num_virtual_tokens:
        return "none in the text"
    parts = [f"{config.num_virtual_tokens}, in place of the tokens from position {config.start_idx} on"]
    if config.class_specific:
        parts.append("different ones for each class")
    if config.image_conditioned:
        parts.append("shifted by what a small network sees in the image embedding")
    if config.class_token_position.value != "end":
        parts.append(f"class name: {config.class_token_position.value}")
    if config.text_prompt_depth != 1:
        parts.append(f"fresh ones before each of the first {config.text_prompt_depth} layers")
    return "; ".join(parts)


def _other_prompts(config) -> list[str]:
    lines = []
    if config.num_vision_virtual_tokens:
        origin = ", linear maps of the text vectors" if config.vision_prompts_from_text else ""
        depth = f", in {config.vision_prompt_depth} layers" if config.vision_prompt_depth != 1 else ""
        lines.append(f"- Vision prompts: {config.num_vision_virtual_tokens} behind the patches{depth}{origin}")
    if config.regularizer:
        lines.append(f"- Trained with the regularizer: {config.regularizer}")
    return lines


def _base_model(base: str | None) -> str:
    if is_hub_id(base):
        return inline_code(base)
    # the last part only: where it lies is nobody's business
    name = inline_code(os.path.basename(os.path.normpath(base))) + ", a folder" if base else "unknown"
    return f"{name} (not on the Hub: pass `base_model_name_or_path` when loading)"


def _revision(config) -> str:
    return f" at revision {inline_code(config.revision)}" if config.revision else ""


def _snippet(repo_id) -> list[str]:
    return [
        "```python",
        "# pip install clip_prompt_peft",
        "from clip_prompt_peft import AutoPeftModelForPromptClassification",
        "",
        f'model = AutoPeftModelForPromptClassification.from_pretrained("{repo_id or "ID_OF_THIS_REPOSITORY"}")',
        "model.config.id2label  # class names; model(pixel_values=...).logits scores them",
        "```",
        "",
        "With peft alone, `import clip_prompt_peft` first: that makes the method known to "
        "`PeftModel.from_pretrained(clip, ...)` and, in transformers, `load_adapter(...)` of the base model.",
    ]
