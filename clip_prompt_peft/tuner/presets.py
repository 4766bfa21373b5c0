"""The published methods as settings of one configuration: a row each."""

from __future__ import annotations


# The settings of the papers for ViT-B/16, as their authors' code has them. Where a row names no initialisation, the
# vectors start from the words that they replace ("a photo of a" with the default template); with 2 vectors the last
# two of these words stay in the prompt. `None` is every layer of a tower.
PRESETS: dict[str, dict] = {
    "coop": {"num_virtual_tokens": 16, "prompt_tuning_init": "RANDOM"},
    "coop-csc": {"num_virtual_tokens": 16, "prompt_tuning_init": "RANDOM", "class_specific": True},
    "cocoop": {"num_virtual_tokens": 4, "image_conditioned": True},
    "vpt-shallow": {"num_virtual_tokens": 0, "num_vision_virtual_tokens": 8, "vision_prompt_depth": 1},
    "vpt-deep": {"num_virtual_tokens": 0, "num_vision_virtual_tokens": 8, "vision_prompt_depth": None},
    "ivlp": {
        "num_virtual_tokens": 4,
        "text_prompt_depth": 9,
        "num_vision_virtual_tokens": 4,
        "vision_prompt_depth": 9,
    },
    "maple": {
        "num_virtual_tokens": 2,
        "text_prompt_depth": 9,
        "num_vision_virtual_tokens": 2,
        "vision_prompt_depth": 9,
        "vision_prompts_from_text": True,
    },
    "kgcoop": {"num_virtual_tokens": 4, "regularizer": "kgcoop"},
    "prograd": {"num_virtual_tokens": 16, "prompt_tuning_init": "RANDOM", "regularizer": "prograd"},
    "promptsrc": {
        "num_virtual_tokens": 4,
        "text_prompt_depth": 9,
        "num_vision_virtual_tokens": 4,
        "vision_prompt_depth": 9,
        "regularizer": "promptsrc",
    },
}


def preset_settings(name: str, num_text_layers: int | None = None, num_vision_layers: int | None = None) -> dict:
    """The fields of a preset, its depths cut to the layers that there are.

    Args:
        name: one of `PRESETS`.
        num_text_layers, num_vision_layers: of the model at hand; `None` leaves the paper's depths.

    Raises:
        ValueError: unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {sorted(PRESETS)}.")
    settings = dict(PRESETS[name])
    for field, num_layers in (("text_prompt_depth", num_text_layers), ("vision_prompt_depth", num_vision_layers)):
        if num_layers is not None and settings.get(field) is not None:
            settings[field] = min(settings[field], num_layers)
    if settings.get("vision_prompts_from_text"):  # each is a map of a text prompt
        settings["vision_prompt_depth"] = min(settings["vision_prompt_depth"], settings["text_prompt_depth"])
    return settings
