"""The published methods as presets of the configuration, one row for each."""

from __future__ import annotations


# The settings for ViT-B/16 in the code of the papers' authors. Without a `prompt_tuning_init`, vectors start from the
# words that they replace ("a photo of a" with the default template; 2 vectors leave the last two of these words in the
# prompt). A depth of `None` means every layer of the tower.
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
    "tcp": {
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "RANDOM",
        "class_aware_layer": 8,
        "regularizer": "kgcoop",
    },
    "promptkd": {
        "num_virtual_tokens": 0,
        "num_vision_virtual_tokens": 4,
        "vision_prompt_depth": 9,
        "projection_dim": 768,  # of the authors' teacher, a ViT-L/14
    },
    "promptsrc": {
        "num_virtual_tokens": 4,
        "text_prompt_depth": 9,
        "num_vision_virtual_tokens": 4,
        "vision_prompt_depth": 9,
        "regularizer": "promptsrc",
    },
}


def preset_settings(name: str, num_text_layers: int | None = None, num_vision_layers: int | None = None) -> dict:
    """Returns the fields of a preset, with depths limited to the number of layers.

    Args:
        name (`str`):
            One of `PRESETS`.
        num_text_layers, num_vision_layers (`int`, *optional*):
            The numbers of layers of the model. `None` keeps the depth of the paper.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {sorted(PRESETS)}.")
    settings = dict(PRESETS[name])
    for field, num_layers in (("text_prompt_depth", num_text_layers), ("vision_prompt_depth", num_vision_layers)):
        if num_layers is not None and settings.get(field) is not None:
            settings[field] = min(settings[field], num_layers)
    if num_text_layers is not None and "class_aware_layer" in settings:
        settings["class_aware_layer"] = min(settings["class_aware_layer"], num_text_layers - 1)
    if settings.get("vision_prompts_from_text"):  # there is a text prompt for each vision prompt
        settings["vision_prompt_depth"] = min(settings["vision_prompt_depth"], settings["text_prompt_depth"])
    return settings
