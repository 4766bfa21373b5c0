"""The fields of an `open_clip_config.json`, their defaults, and the values that each may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


BLOCK_FEATURES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
BLOCK = {"block_type": None, **dict.fromkeys(BLOCK_FEATURES, False)}

TOP: dict[str, Any] = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "quick_gelu": False,
    "custom_text": False,
    "init_logit_scale": None,  # the value itself comes with the weights
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "multimodal_cfg": None,
}
VISION: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "patch_dropout": 0.0,  # of training
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    **BLOCK,
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,  # of training
    "timm_drop_path": None,
}
TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "final_ln_after_pool": False,  # open_clip does not read it for its own text tower
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    **BLOCK,
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}
PREPROCESS: dict[str, Any] = {
    "size": None,  # open_clip takes that of the image tower
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def is_size(value) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value))
    return value is None or is_count(value) or pair  # a ResNet has no patches


def is_color(value) -> bool:
    return is_number(value) or (isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_number, value)))


def is_depth(value) -> bool:
    return is_count(value) or (isinstance(value, list) and bool(value) and all(map(is_count, value)))


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_flag(value) -> bool:
    return isinstance(value, bool)


def is_optional_number(value) -> bool:
    return value is None or is_number(value)


def is_optional_text(value) -> bool:
    return value is None or isinstance(value, str)


def is_optional_dict(value) -> bool:
    return value is None or isinstance(value, dict)


Rule = tuple[Callable[[Any], bool], str]
COUNT, RATIO = (is_count, "a whole number of 1 or more"), (is_positive, "a positive number")
SIZE, FLAG, NUMBER = (is_size, "a size or two"), (is_flag, "true or false"), (is_optional_number, "a number")
NAME, SETTINGS, ID = (is_optional_text, "a text"), (is_optional_dict, "an object"), (is_id, "a token id")
RULES: dict[str, Rule] = {
    "embed_dim": COUNT,
    "quick_gelu": FLAG,
    "init_logit_bias": NUMBER,
    "width": COUNT,
    "head_width": COUNT,
    "heads": COUNT,
    "layers": (is_depth, "a number of layers"),
    "mlp_ratio": RATIO,
    "patch_size": SIZE,
    "image_size": SIZE,
    "context_length": COUNT,
    "vocab_size": COUNT,
    "pad_id": ID,
    "eos_id": ID,
    "ls_init_value": NUMBER,
    "no_ln_pre": FLAG,
    "no_causal_mask": FLAG,
    "embed_cls": FLAG,
    "proj_bias": FLAG,
    "act_kwargs": SETTINGS,
    "norm_kwargs": SETTINGS,
    "tokenizer_kwargs": SETTINGS,
    "timm_model_name": NAME,
    "hf_model_name": NAME,
    "hf_tokenizer_name": NAME,
    "mean": (is_color, "a number or three"),
    "std": (is_color, "a number or three"),
}


def with_defaults(section: object, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of a section of the configuration, with the defaults of those that are not given.

    Args:
        section (`object`):
            The section, as JSON has it.
        defaults (`Mapping[str, Any]`):
            The defaults of all fields.
        where (`str`):
            The name of the section, for error messages; empty for the model itself.

    Raises:
        ValueError: If the section is no object, or a field has a value that it cannot have. Unknown fields are kept.
    """
    if not isinstance(section, dict):
        raise ValueError(f"{where or 'model_cfg'} must be an object of fields, got {section!r}.")
    values = {**defaults, **section}
    for name, (is_allowed, expected) in RULES.items():
        if name in values and name in defaults and not is_allowed(values[name]):
            raise ValueError(f"{name_of(where, name)} must be {expected}, got {values[name]!r}.")
    return values


def name_of(where: str, field: str) -> str:
    """Returns the name of a field with its section."""
    return f"{where}.{field}" if where else field
