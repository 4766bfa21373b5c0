"""The part of an adapter's model card that is ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .card_details import CardDetails, add_metadata, details_section
from .markdown import inline_code, table_cell


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
    if config.has_row_positions:
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
