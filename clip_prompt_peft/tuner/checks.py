"""What a configuration may say, as far as that shows without a model."""

from __future__ import annotations

from peft import PromptTuningInit

from ..class_prompts import check_class_names, check_template
from ..losses import build_regularizer
from ..problem_type import PROBLEM_TYPES


MAX_TOKENS = 1000  # the literature has up to 200; a file must not ask for any amount of memory
STRINGS = ("base_model_name_or_path", "peft_version", "regularizer", "revision", "tokenizer_name_or_path")
FLAGS = ("class_specific", "image_conditioned", "inference_mode", "vision_prompts_from_text")
PATTERNS, LISTS = ("target_modules", "exclude_modules"), ("modules_to_save",)
DICTS = ("auto_mapping", "regularizer_weights")


def check_config(config) -> None:
    """Raises `ValueError` for a bad value, or for values that do not go together."""
    _check_types(config)
    _check_numbers(config)
    _check_texts(config)
    _check_text_prompts(config)
    _check_vision_prompts(config)
    _check_regularizer(config)


def _check_types(config) -> None:
    # a configuration may come from a file, and a value of another type would fail somewhere deep in other libraries
    for names, kind, is_of_kind in (
        (STRINGS, "a string", lambda value: value is None or isinstance(value, str)),
        (FLAGS, "True or False", lambda value: isinstance(value, bool)),
        (PATTERNS, "a list of strings, or a string", lambda value: value is None or _is_strings(value, or_one=True)),
        (LISTS, "a list of strings", lambda value: value is None or _is_strings(value)),
        (DICTS, "a dictionary", lambda value: value is None or isinstance(value, dict)),
    ):
        for name in names:
            value = getattr(config, name)
            if not is_of_kind(value):
                raise ValueError(f"{name} must be {kind}, got {value!r}.")
    ids = config.init_token_ids
    if ids is not None and not (isinstance(ids, list) and all(_is_int_from(0, i) for i in ids)):
        raise ValueError(f"init_token_ids must be a list of token ids, got {ids!r}.")


def _is_strings(value, or_one: bool = False) -> bool:
    if isinstance(value, str):
        return or_one
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) and item for item in value)


def check_resolved(config) -> None:
    """Raises `ValueError` if what an injection fills in, and a file brings back, is damaged."""
    ids = config.replaced_token_ids
    if not isinstance(ids, list) or not all(_is_int_from(0, i) for i in ids) or len(ids) != config.num_virtual_tokens:
        raise ValueError(
            f"replaced_token_ids must be {config.num_virtual_tokens} token ids, one for each virtual token, got "
            f"{ids!r}; the adapter's configuration is damaged."
        )
    check_template(config.padded_template)
    if config.start_idx is None:
        raise ValueError("start_idx must be given with replaced_token_ids; the adapter's configuration is damaged.")


def as_member(enum_class, value, field_name: str):
    """The member of `enum_class` with this value; `ValueError` with the allowed ones if there is none."""
    try:
        return enum_class(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in enum_class)
        raise ValueError(f"{field_name} must be one of {allowed}, got {value!r}.") from None


def _check_numbers(config) -> None:
    n = config.num_virtual_tokens
    least = 1 if config.num_vision_virtual_tokens == 0 else 0
    if n is not None and not _is_int_from(least, n):
        hint = " (0, no text vectors, only with num_vision_virtual_tokens)" if n == 0 else ""
        raise ValueError(f"num_virtual_tokens must be a positive integer, got {n!r}{hint}.")
    if config.start_idx is not None and not _is_int_from(0, config.start_idx):
        raise ValueError(
            "start_idx must be an integer of at least 0, or None for the first position behind the begin token, got "
            f"{config.start_idx!r}."
        )
    if not _is_int_from(0, config.num_vision_virtual_tokens):
        raise ValueError(
            f"num_vision_virtual_tokens must be an integer of at least 0, got {config.num_vision_virtual_tokens!r}."
        )
    for name in ("num_virtual_tokens", "num_vision_virtual_tokens"):
        if (getattr(config, name) or 0) > MAX_TOKENS:
            raise ValueError(f"{name} must be at most {MAX_TOKENS}, got {getattr(config, name)}.")
    for name in ("text_prompt_depth", "vision_prompt_depth"):
        depth = getattr(config, name)
        if depth is not None and not _is_int_from(1, depth):
            raise ValueError(f"{name} must be a positive integer, or None for every layer, got {depth!r}.")


def _check_texts(config) -> None:
    if config.prompt_template is not None:
        check_template(config.prompt_template)
    if config.class_names is not None:
        config.class_names = check_class_names(config.class_names)
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(
            f"problem_type must be None or one of {', '.join(map(repr, PROBLEM_TYPES))}, got {config.problem_type!r}."
        )
    if config.prompt_tuning_init_text is None:
        return
    if config.prompt_tuning_init is not PromptTuningInit.TEXT:
        raise ValueError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} is only used with "
            f"prompt_tuning_init='TEXT', got {config.prompt_tuning_init.value!r}."
        )
    if not isinstance(config.prompt_tuning_init_text, str) or not config.prompt_tuning_init_text.strip():
        raise ValueError(f"prompt_tuning_init_text must hold words, got {config.prompt_tuning_init_text!r}.")


def _check_text_prompts(config) -> None:
    if config.num_virtual_tokens == 0:
        asked = [
            f"{name}={getattr(config, name)!r}"
            for name, unused in [
                ("class_specific", False),
                ("image_conditioned", False),
                ("text_prompt_depth", 1),
                ("prompt_tuning_init_text", None),
            ]
            if getattr(config, name) != unused
        ] + [f"class_token_position={config.class_token_position.value!r}"] * config.has_row_positions
        if asked:
            raise ValueError(
                f"{asked[0]} is about text vectors, but num_virtual_tokens=0 asks for none; leave one of them out."
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
            "vision_prompts_from_text needs vision prompts; set num_vision_virtual_tokens to the number of text "
            "vectors."
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


def check_coupled_depths(config) -> None:
    """Raises `ValueError` if a vision prompt has no text prompt to come from."""
    text, vision = config.text_prompt_depth, config.vision_prompt_depth
    if config.vision_prompts_from_text and None not in (text, vision) and vision > text:
        raise ValueError(
            f"vision_prompts_from_text maps the text prompts of each depth, but vision_prompt_depth={vision} goes "
            f"beyond text_prompt_depth={text}; make them equal."
        )


def _check_regularizer(config) -> None:
    if config.regularizer is not None:
        build_regularizer(config.regularizer, config.regularizer_weights)
    else:
        for name in ("regularizer_weights", "teacher_templates"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name}={getattr(config, name)!r} needs a regularizer; name one.")
    if config.teacher_templates is not None:
        if not isinstance(config.teacher_templates, (list, tuple)) or not config.teacher_templates:
            raise ValueError(f"teacher_templates must be a list of templates, got {config.teacher_templates!r}.")
        for template in config.teacher_templates:
            check_template(template)
        config.teacher_templates = list(config.teacher_templates)


def _is_int_from(least: int, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
