"""Checks of what a configuration from a file holds: the types of its values, and what an injection has set."""

from __future__ import annotations

from ..templates import check_template


FORMAT_VERSION = 1  # of adapter_config.json; files without a version are of this one, too


def check_types(config) -> None:
    """Raises `ValueError` for a value of another type than its field, or a file of a later format."""
    # The values may come from a file; of a wrong type, they would fail somewhere deep inside of other libraries.
    strings = ("base_model_name_or_path", "base_model_subfolder", "peft_version", "regularizer", "revision")
    strings = (*strings, "tokenizer_name_or_path")
    dictionaries = ("auto_mapping", "base_model_fingerprint", "regularizer_weights", "tokenizer_fingerprint")
    flags = ("class_specific", "image_conditioned", "inference_mode", "vision_prompts_from_text")
    for names, kind, is_of_kind in (
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
    ):
        for name in names:
            if not is_of_kind(getattr(config, name)):
                raise ValueError(f"{name} must be {kind}, got {getattr(config, name)!r}.")
    if not is_int_from(1, config.format_version) or config.format_version > FORMAT_VERSION:
        raise ValueError(
            f"The adapter has the file format {config.format_version!r}, but this version of clip_prompt_peft reads "
            f"formats up to {FORMAT_VERSION}; install a newer version."
        )


def check_resolved(config) -> None:
    """Raises `ValueError` unless a configuration from a file has what an injection sets."""
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


def is_int_from(smallest: int, value) -> bool:
    """Returns whether a value is an integer of at least `smallest`, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest
