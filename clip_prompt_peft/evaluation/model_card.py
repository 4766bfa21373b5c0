"""The model card of a prompt adapter: its section in README.md and its metadata."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..class_head import ClassHeadConfig
from ..installing import how_to_install
from ..tuner import ClassifierAdapterConfig, CLIPPromptTuningConfig
from .tables import counted, inline_code, markdown_table, table_cell


if TYPE_CHECKING:  # these modules import `datasets` and `evaluate`, which importing the package must not do
    from .calibration import TemperatureFit
    from .comparison import Comparison
    from .interpret import NearestWords

PACKAGES = ("clip_prompt_peft", "peft", "transformers", "torch", "datasets")
BEGIN, END = "<!-- clip_prompt_peft: begin -->", "<!-- clip_prompt_peft: end -->"
BASE_TAG = "base_model:adapter:"  # the prefix of the tag by which peft and the Hub link an adapter to its base model
NUM_CLASSES_SHOWN, NUM_VECTORS_SHOWN = 50, 16
LOWER_IS_BETTER = {"expected_calibration_error": " (lower is better)"}
LOADING = """
```python
# {install}
from clip_prompt_peft import AutoPeftModelForPromptClassification

model = AutoPeftModelForPromptClassification.from_pretrained("{repo_id}")
model.config.id2label  # class names; model(pixel_values=...).logits scores them
```

The pipeline for images (the stock task `"image-classification"` cannot load this adapter):

```python
import clip_prompt_peft
from transformers import pipeline

classify = pipeline("prompt-image-classification", model="{repo_id}")
classify("image.jpg")
```

To load the adapter with peft (`PeftModel.from_pretrained(clip, ...)`) or transformers (`clip.load_adapter(...)`), \
run `import clip_prompt_peft` first, which registers the method."""


@dataclass(frozen=True)
class TrainingData:
    """
    The data that an adapter was trained on.

    Attributes:
        name (`str`):
            The name of the data set.
        num_images (`int`):
            The number of training images.
        hub_id (`str`, *optional*):
            The Hub id of the data set.
        shots (`int`, *optional*):
            The number of images per class, or `None` if all images were used.
        seed (`int`, *optional*):
            The seed of the few-shot sample.
        content_hash (`str`, *optional*):
            The hash of images and labels, see [`~data.content_hash`].
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
    Facts for the model card that the adapter itself does not store.

    Attributes:
        data (`TrainingData`, *optional*):
            The training data.
        settings (`Mapping[str, object]`, *optional*):
            Training settings by name.
        test_name (`str`, *optional*, defaults to `"test"`):
            The name of the test set.
        comparison (`Comparison`, *optional*):
            The results on the test set, with and without the adapter.
        words (`Sequence[NearestWords]`, *optional*):
            The result of [`nearest_words`].
        calibration (`TemperatureFit`, *optional*):
            The result of [`~evaluation.calibration.fit_temperature`].
    """

    data: TrainingData | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    test_name: str = "test"
    comparison: Comparison | None = None
    words: Sequence[NearestWords] = ()
    calibration: TemperatureFit | None = None


def environment_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that results depend on, by name."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def is_hub_id(name: str | None) -> bool:
    """Returns whether `name` is a valid Hub id and not an existing local path."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def empty_card() -> ModelCard:
    """Returns a card without text."""
    return ModelCard("---\nlibrary_name: peft\n---\n")


def add_prompt_section(
    card: ModelCard,
    config,
    metrics: Mapping[str, float] | None = None,
    repo_id: str | None = None,
    details: CardDetails | None = None,
) -> None:
    """Adds the section about the prompts to a model card, or replaces it, and updates the metadata.

    Args:
        card (`ModelCard`):
            The card to change in place.
        config (`CLIPPromptTuningConfig` or `ClassHeadConfig`):
            The configuration of the adapter.
        metrics (`Mapping[str, float]`, *optional*):
            Results by name.
        repo_id (`str`, *optional*):
            The Hub id of the adapter.
        details (`CardDetails`, *optional*):
            The training data, settings and results.
    """
    _add_metadata(card, config)
    if details is not None:
        _add_results(card, details, model_name=repo_id or "CLIP prompts")
    section = "\n".join([BEGIN, *_section(config, metrics or {}, repo_id, details), END])
    if BEGIN in card.text:
        pattern = re.escape(BEGIN) + ".*" + re.escape(END)  # greedy, because a class name may contain the end marker
        card.text = re.sub(pattern, lambda _: section, card.text, flags=re.DOTALL)
    else:
        card.text = f"{section}\n\n{card.text.strip()}\n"


def _add_metadata(card: ModelCard, config) -> None:
    base = config.base_model_name_or_path
    card.data["library_name"] = "peft"
    card.data["pipeline_tag"] = "image-classification"
    tags = {tag for tag in card.data.get("tags") or [] if not tag.startswith(BASE_TAG)}
    kind = "class-head" if isinstance(config, ClassHeadConfig) else "prompt-tuning"
    tags |= {"clip", kind, "clip_prompt_peft"}
    if is_hub_id(base):
        card.data["base_model"] = base
        tags.add(BASE_TAG + base)
    else:  # peft writes the path of a local folder, which is not a valid model id
        card.data.base_model = None
    card.data["tags"] = sorted(tags)


def _add_results(card: ModelCard, details: CardDetails, model_name: str) -> None:
    """Adds the results in the Hub's `model-index` format and keeps existing results on other test sets."""
    data = details.data
    if data is not None and data.hub_id and data.hub_id not in (card.data.datasets or []):
        card.data.datasets = [*(card.data.datasets or []), data.hub_id]
    if details.comparison is None:
        return
    name = data.name if data is not None else details.test_name
    dataset_type = (data.hub_id if data is not None else None) or name
    test_set = (dataset_type, details.test_name)
    results = card.data.eval_results or []
    card.data.model_name = model_name
    card.data.eval_results = [
        result for result in results if (result.dataset_type, result.dataset_split) != test_set
    ] + [
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


def _section(config, metrics: Mapping[str, float], repo_id: str | None, details: CardDetails | None) -> list[str]:
    facts = _head_facts(config) if isinstance(config, ClassHeadConfig) else _prompt_facts(config)
    title = "Class head" if isinstance(config, ClassHeadConfig) else "Learned prompts"
    facts = {"Base model": _base_model(config), **facts, **_class_facts(config)}
    lines = [f"## {title} for CLIP", "", *(f"- {name}: {value}" for name, value in facts.items() if value)]
    if metrics:
        rows = [[table_cell(name), f"{value:.4g}"] for name, value in metrics.items()]
        lines += ["", markdown_table([["metric", "value"], *rows])]
    if details is not None:
        if details.data is not None:
            lines += ["", "### Training", "", *_training_lines(details.data, details.settings)]
        if details.comparison is not None:
            lines += ["", f"### Results on {inline_code(details.test_name)}", "", *_result_lines(details.comparison)]
        if config.temperature is not None or config.conformal_scores is not None:
            lines += ["", "### Calibration", "", *_calibration_lines(config, details)]
        if details.words:
            lines += ["", "### Nearest vocabulary words", "", *_word_lines(details.words)]
        versions = ", ".join(f"{name} {version}" for name, version in environment_versions().items())
        lines += ["", f"Made with {versions}."]
    return [*lines, LOADING.format(repo_id=repo_id or "ID_OF_THIS_REPOSITORY", install=how_to_install())]


def _prompt_facts(config: CLIPPromptTuningConfig) -> dict[str, str | None]:
    return {
        "Vectors": _text_prompts(config),
        "Vision prompts": _vision_prompts(config),
        "Trained with the regularizer": config.regularizer,
        "Template": inline_code(config.padded_template or config.prompt_template),
        "Initialized from": config.prompt_tuning_init.value,
    }


def _head_facts(config: ClassHeadConfig) -> dict[str, str | None]:
    kinds = {
        "linear": "a row of weights for each class" + (", held near its zero-shot embedding" if config.pull else ""),
        "cache": f"{config.num_keys or 0} {'trained ' if config.train_keys else ''}keys of training images, "
        f"alpha {config.alpha:g}, beta {config.beta:g}",
    }
    is_tuned = config.target_modules is not None
    templates = config.start_templates or [config.prompt_template]
    return {
        "Head": "not started, the text tower answers" if config.starts_later else kinds[config.head_type],
        "LayerNorms": "tuned beside it" if is_tuned else None,
        "Started from": ", ".join(map(inline_code, templates[:NUM_VECTORS_SHOWN])),
        "Other classes": "by their names, with the text tower",
    }


def _class_facts(config: ClassifierAdapterConfig) -> dict[str, str | None]:
    names = config.class_names or []
    shown = ", ".join(inline_code(name) for name in names[:NUM_CLASSES_SHOWN])
    if len(names) > NUM_CLASSES_SHOWN:
        shown += f", ... ({len(names) - NUM_CLASSES_SHOWN} more)"
    return {
        "Temperature, by which logits are divided": config.temperature and f"{config.temperature:.4g}",
        f"Classes ({len(names)})": shown or "none saved",
    }


def _base_model(config) -> str:
    base = config.base_model_name_or_path
    if is_hub_id(base):
        return inline_code(base) + (f" at revision {inline_code(config.revision)}" if config.revision else "")
    # only the name of a local folder is shown, because its full path is private
    folder = f"{inline_code(os.path.basename(os.path.normpath(base)))}, a folder" if base else "unknown"
    return f"{folder} (not on the Hub: pass `base_model_name_or_path` when loading)"


def _text_prompts(config) -> str:
    if not config.num_virtual_tokens:
        return "none in the text"
    parts = [f"{config.num_virtual_tokens}, replacing the tokens from position {config.start_idx}"]
    if config.class_specific:
        parts.append("separate ones for each class")
    if config.image_conditioned:
        parts.append("shifted by a small network that reads the image embedding")
    if config.class_token_position.value != "end":
        parts.append(f"class token position: {config.class_token_position.value}")
    if config.text_prompt_depth != 1:
        parts.append(f"new ones in each of the first {config.text_prompt_depth} layers")
    if config.class_aware_layer is not None:
        parts.append(
            f"before layer {config.class_aware_layer} (the first is 0) those of each class, which a small network "
            "makes of its zero-shot embedding"
        )
    return "; ".join(parts)


def _vision_prompts(config) -> str | None:
    if not config.num_vision_virtual_tokens:
        return None
    depth = f", in {config.vision_prompt_depth} layers" if config.vision_prompt_depth != 1 else ""
    origin = ", linear maps of the text vectors" if config.vision_prompts_from_text else ""
    return f"{config.num_vision_virtual_tokens} after the image patches{depth}{origin}"


def _training_lines(data: TrainingData, settings: Mapping[str, object]) -> list[str]:
    facts = {
        "Data set": data.hub_id or data.name,
        "Images": data.num_images,
        "Shots": data.shots,
        "Seed": data.seed,
        "Hash of images and labels": data.content_hash,
    }
    facts = {name: value for name, value in facts.items() if value is not None} | dict(settings)
    return [f"- {name}: {inline_code(str(value))}" for name, value in facts.items()]


def _result_lines(comparison: Comparison) -> list[str]:
    metrics = [
        [name.replace("_", " ") + LOWER_IS_BETTER.get(name, ""), f"{zero_shot:.4f}", f"{tuned:.4f}"]
        for name, zero_shot, tuned in comparison.metric_rows()
    ]
    classes = [
        [table_cell(name), str(count), f"{zero_shot:.2f}", f"{tuned:.2f}"]
        for name, count, zero_shot, tuned, _ in comparison.class_rows()[:NUM_CLASSES_SHOWN]
    ]
    gained, lost = len(comparison.gained), len(comparison.lost)
    return [
        markdown_table([["metric", "zero-shot", "tuned"], *metrics]),
        "",
        f"{gained} of {counted(len(comparison.tuned.labels), 'image')} "
        f"{'is' if gained == 1 else 'are'} classified correctly only with the adapter, and "
        f"{lost} only without it.",
        "",
        markdown_table([["class", "images", "accuracy, zero-shot", "accuracy, tuned"], *classes]),
    ]


def _calibration_lines(config, details: CardDetails) -> list[str]:
    fit, comparison, lines = details.calibration, details.comparison, []
    error = "the expected calibration error is {:.4f} without the temperature and {:.4f} with it."
    if fit is not None:
        images = counted(fit.num_images, "validation image")
        lines += [f"On the {images} that it was fitted on, {error.format(fit.ece_before, fit.ece_after)}", ""]
    errors = None if comparison is None else comparison.calibration_errors()
    if errors is not None:
        lines += [f"On {inline_code(details.test_name)}, {error.format(*errors)}", ""]
    rows = [] if comparison is None else comparison.coverage_rows(config.conformal_scores)
    if rows:
        scores = config.conformal_scores
        lines += [
            f"Sets of classes (split conformal prediction, {scores['method']}, scores of "
            f"{counted(scores['num_images'], 'validation image')}) on {inline_code(details.test_name)}:",
            "",
            markdown_table(
                [
                    ["coverage asked for", "sets with the true class", "mean size", "empty sets"],
                    *([f"{row[0]:.2f}", f"{row[1]:.4f}", f"{row[2]:.2f}", f"{row[3]:.4f}"] for row in rows),
                ]
            ),
        ]
    elif config.conformal_scores is not None:
        lines.append("The adapter holds scores for sets of classes with a coverage (`ConformalClassifier`).")
    return lines


def _word_lines(words: Sequence[NearestWords]) -> list[str]:
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
        markdown_table([["position", "in place of", "nearest words, distance"], *rows]),
        "",
        f"The typical distance from a word to its nearest other word is {words[0].typical_distance:.2f}. {far} of "
        f"{len(words)} vectors are farther than that from every word. The nearest words of such vectors say little.",
    ]
