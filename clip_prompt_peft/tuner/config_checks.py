"""Checks of the values of a [`CLIPPromptTuningConfig`] that need no model, and what those values may be."""

from __future__ import annotations

import enum

from peft import PromptTuningInit

from ..templates import check_class_names, check_template
from .base_config import (
    PROBLEM_TYPES,
    check_calibration,
    check_format_version,
    check_kinds,
    check_templates,
    is_int_from,
)


MAX_PROJECTION = 8192  # the widest embeddings of known models have 2048
MAX_TOKENS = 1000  # the literature uses up to 200; a file must not be able to ask for any amount of memory

# The names and weights of the regularizers in `clip_prompt_peft.regularizers`. They are repeated here since the tuner
# knows nothing of classifiers and their losses; a test compares the two.
REGULARIZER_WEIGHTS = {
    "kgcoop": ("weight",),
    "prograd": ("projection", "temperature"),
    "promptsrc": ("text", "image", "logits"),
}


def check_config(config) -> None:
    """Raises `ValueError` if a value of a configuration is not allowed, or values exclude each other."""
    checks = (_check_types, _check_numbers, _check_texts, _check_text_prompts, _check_vision_prompts)
    for check in (*checks, _check_class_aware, _check_projection, _check_regularizer):
        check(config)
    check_templates(config, "teacher_templates")
    check_calibration(config)


def check_coupled_depths(config) -> None:
    """Raises `ValueError` if vision prompts reach deeper than the text prompts that they are mapped from."""
    text, vision = config.text_prompt_depth, config.vision_prompt_depth
    if config.vision_prompts_from_text and None not in (text, vision) and vision > text:
        raise ValueError(
            f"vision_prompts_from_text maps the text prompts of each depth, but vision_prompt_depth={vision} goes "
            f"beyond text_prompt_depth={text}; make them equal."
        )


def check_deep_prompts_end(config) -> None:
    """Raises `ValueError` if deep prompts would overwrite the vectors of the classes."""
    layer, depth = config.class_aware_layer, config.text_prompt_depth
    if layer is not None and depth is not None and depth > layer:
        raise ValueError(
            f"class_aware_layer={layer} puts in vectors of each class, which the deep prompts of text_prompt_depth="
            f"{depth} (layers 0 ... {depth - 1}) would overwrite; take a text_prompt_depth of at most {layer}."
        )


def _check_types(config) -> None:
    # The values may come from a file; of a wrong type, they would fail somewhere deep inside of other libraries.
    strings = ("base_model_name_or_path", "base_model_subfolder", "peft_version", "regularizer", "revision")
    strings = (*strings, "tokenizer_name_or_path")
    dictionaries = ("auto_mapping", "base_model_fingerprint", "regularizer_weights", "tokenizer_fingerprint")
    flags = ("class_specific", "image_conditioned", "inference_mode", "vision_prompts_from_text")
    kinds = (
        (strings, "a string", lambda value: value is None or isinstance(value, str)),
        (flags, "True or False", lambda value: isinstance(value, bool)),
        (("target_modules", "exclude_modules"), "a list of strings, or a string", _is_patterns),
        (("modules_to_save",), "a list of strings", lambda value: _is_patterns(value) and not isinstance(value, str)),
        (
            dictionaries,
            "a dictionary",
            lambda value: isinstance(value, dict | None),
        ),
        (("init_token_ids",), "a list of token ids", lambda value: value is None or _is_token_ids(value)),
    )
    check_kinds(config, kinds)
    check_format_version(config)


def _check_numbers(config) -> None:
    n = config.num_virtual_tokens
    smallest = 1 if config.num_vision_virtual_tokens == 0 and config.projection_dim is None else 0
    if n is not None and not is_int_from(smallest, n):
        hint = " (0, no text vectors, only with num_vision_virtual_tokens or projection_dim)" if n == 0 else ""
        raise ValueError(f"num_virtual_tokens must be a positive integer, got {n!r}{hint}.")
    if config.start_idx is not None and not is_int_from(0, config.start_idx):
        raise ValueError(
            "start_idx must be an integer of at least 0, or None for the position after the begin token, got "
            f"{config.start_idx!r}."
        )
    if not is_int_from(0, config.num_vision_virtual_tokens):
        raise ValueError(
            f"num_vision_virtual_tokens must be an integer of at least 0, got {config.num_vision_virtual_tokens!r}."
        )
    for name in ("num_virtual_tokens", "num_vision_virtual_tokens"):
        if (getattr(config, name) or 0) > MAX_TOKENS:
            raise ValueError(f"{name} must be at most {MAX_TOKENS}, got {getattr(config, name)}.")
    for name in ("text_prompt_depth", "vision_prompt_depth"):
        depth = getattr(config, name)
        if depth is not None and not is_int_from(1, depth):
            raise ValueError(f"{name} must be a positive integer, or None for every layer, got {depth!r}.")


def _check_texts(config) -> None:
    if config.prompt_template is not None:
        check_template(config.prompt_template)
    if config.class_names is not None:
        config.class_names = check_class_names(config.class_names)
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type must be None or one of {PROBLEM_TYPES}, got {config.problem_type!r}.")
    text = config.prompt_tuning_init_text
    if text is not None and config.prompt_tuning_init is not PromptTuningInit.TEXT:
        raise ValueError(
            f"prompt_tuning_init_text={text!r} is only used with prompt_tuning_init='TEXT', got "
            f"{config.prompt_tuning_init.value!r}."
        )
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise ValueError(f"prompt_tuning_init_text must hold words, got {text!r}.")


def _check_text_prompts(config) -> None:
    if config.num_virtual_tokens == 0:
        unused = {
            "class_specific": False,
            "image_conditioned": False,
            "text_prompt_depth": 1,
            "prompt_tuning_init_text": None,
            "class_token_position": "end",
            "class_aware_layer": None,
        }
        for name, default in unused.items():
            value = getattr(config, name)
            if value != default:
                shown = value.value if isinstance(value, enum.Enum) else value
                raise ValueError(
                    f"{name}={shown!r} is about text vectors, but num_virtual_tokens=0 asks for none; leave one of "
                    "them out."
                )
    if config.class_specific and config.image_conditioned:
        raise ValueError(
            "class_specific and image_conditioned exclude each other: the vectors differ either from class to class "
            "or from image to image; set one of them to False."
        )
    if config.text_prompt_depth != 1 and not config.has_shared_prefix:
        raise ValueError(
            f"text_prompt_depth={config.text_prompt_depth} needs class_token_position='end' and class_specific=False: "
            "deep prompts are the same, and stand at the same positions, in the texts of all classes."
        )


def _check_class_aware(config) -> None:
    layer = config.class_aware_layer
    if layer is None:
        return
    if not is_int_from(1, layer):
        raise ValueError(
            "class_aware_layer must be the index of a text layer from 1 on, or None for none, got "
            f"{layer!r}. For vectors of each class in the input, use class_specific."
        )
    if config.image_conditioned or not config.has_shared_prefix:
        raise ValueError(
            "class_aware_layer needs class_token_position='end', class_specific=False and image_conditioned=False: up "
            "to that layer, the vectors are the same, and stand at the same positions, in the texts of all classes."
        )
    check_deep_prompts_end(config)


def _check_projection(config) -> None:
    width = config.projection_dim
    if width is None:
        return
    if not is_int_from(1, width) or width > MAX_PROJECTION:
        raise ValueError(f"projection_dim must be an integer from 1 to {MAX_PROJECTION}, or None, got {width!r}.")
    if config.num_virtual_tokens != 0:
        raise ValueError(
            f"projection_dim={width} compares images with the class embeddings of a teacher, so that text vectors "
            f"would have no effect; set num_virtual_tokens=0, got {config.num_virtual_tokens!r}."
        )
    if config.regularizer is not None:
        raise ValueError(
            f"regularizer={config.regularizer!r} compares with the zero-shot model, whose embeddings are not of the "
            f"width projection_dim={width}; leave one of them out."
        )
    if config.teacher_class_names is not None:
        config.teacher_class_names = check_class_names(config.teacher_class_names)
        unknown = [name for name in config.class_names or () if name not in config.teacher_class_names]
        if unknown:
            raise ValueError(f"class_names holds {unknown[0]!r}, which is not in teacher_class_names.")


def _check_vision_prompts(config) -> None:
    n, n_vision = config.num_virtual_tokens, config.num_vision_virtual_tokens
    if n_vision == 0 and config.vision_prompt_depth != 1:
        raise ValueError(
            f"vision_prompt_depth={config.vision_prompt_depth} needs vision prompts; set num_vision_virtual_tokens."
        )
    if not config.vision_prompts_from_text:
        return
    if n_vision == 0:
        raise ValueError(
            "vision_prompts_from_text needs vision prompts; set num_vision_virtual_tokens to num_virtual_tokens."
        )
    if n is not None and n != n_vision:
        raise ValueError(
            "vision_prompts_from_text maps each text vector to one vision prompt, so num_vision_virtual_tokens="
            f"{n_vision} must equal num_virtual_tokens={n}."
        )
    if config.class_specific:
        raise ValueError(
            "vision_prompts_from_text and class_specific exclude each other: an image has no class yet whose vectors "
            "could be mapped; set one of them to False."
        )
    check_coupled_depths(config)


def _check_regularizer(config) -> None:
    if config.regularizer is None:
        for name in ("regularizer_weights", "teacher_templates"):
            is_used = name == "teacher_templates" and config.class_aware_layer is not None
            if getattr(config, name) is not None and not is_used:
                raise ValueError(f"{name}={getattr(config, name)!r} needs a regularizer; name one.")
        return
    if config.regularizer not in REGULARIZER_WEIGHTS:
        raise ValueError(
            f"regularizer must be one of {sorted(REGULARIZER_WEIGHTS)} or None, got {config.regularizer!r}."
        )
    allowed = list(REGULARIZER_WEIGHTS[config.regularizer])
    for key, value in (config.regularizer_weights or {}).items():
        if key not in allowed:
            raise ValueError(f"regularizer_weights of {config.regularizer!r} may be {allowed}, got {key!r}.")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise ValueError(f"regularizer_weights[{key!r}] must be a number of at least 0, got {value!r}.")
        if key == "temperature" and value == 0:
            raise ValueError(f"temperature must be positive, got {value!r}.")


def check_resolved(config) -> None:
    """Raises `ValueError` if a configuration of saved weights lacks what an injection has set, or it is damaged."""
    ids, n = config.replaced_token_ids, config.num_virtual_tokens
    if not _is_token_ids(ids) or len(ids) != n:
        raise ValueError(
            f"replaced_token_ids must be {n} token ids, one for each virtual token, got {ids!r}; the adapter's "
            "configuration is damaged."
        )
    check_template(config.padded_template)
    if config.start_idx is None:
        raise ValueError("start_idx must be given with replaced_token_ids; the adapter's configuration is damaged.")
    if (config.projection_dim is None) != (config.teacher_class_names is None):
        raise ValueError(
            f"projection_dim={config.projection_dim!r} and teacher_class_names={config.teacher_class_names!r} must be "
            "given together or not at all; the adapter's configuration is damaged."
        )


def _is_patterns(value) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) and item for item in value)


def _is_token_ids(value) -> bool:
    return isinstance(value, list) and all(is_int_from(0, i) for i in value)
