"""Whether a model has what a configuration of prompts asks for: towers, layers, positions, tokens, heads."""

from __future__ import annotations

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..heads import ClassHead, ImageHead
from ..towers import (
    Tower,
    embed_width,
    find_towers,
    is_text_embeddings,
    is_vision_embeddings,
    num_positions,
    num_rows,
    takes_patches,
    token_table_name,
    unwrapped,
)
from .config import CLIPPromptTuningConfig


def chosen_towers(config: CLIPPromptTuningConfig, model: nn.Module, kind: str) -> list[Tower]:
    """Returns the towers, `"text"` or `"vision"`, whose embeddings `target_modules` names. By default all are."""
    towers = find_towers(model, kind)
    if config.target_modules is None:
        return towers
    return [tower for tower in towers if check_target_module_exists(config, tower.embeddings_key)]


def embed_width_of(model: nn.Module) -> int | None:
    """Returns E, the width of image and class embeddings: that of the outermost module whose config says it."""
    widths = (embed_width(getattr(module, "config", None)) for module in model.modules())
    return next((width for width in widths if width is not None), None)


def check_towers(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Checks that the model, or the part of it that `target_modules` names, has the towers that are needed."""
    _check_targets(config, model)
    name = type(model).__name__
    if not find_towers(model, "text"):
        raise ValueError(
            f"{name} has no CLIP text embeddings (a module with a token table and a position table; one like BERT's "
            "only beside an image tower), so there is nothing to tune. Models that have them: CLIPModel, "
            "CLIPTextModel, CLIPTextModelWithProjection, those of MetaCLIP 2, SigLIP and SigLIP 2, ChineseCLIPModel, "
            "AltCLIPModel, and the classifiers made of them (CLIPForPromptClassification, ...)."
        )
    needs_width = "image_conditioned" if config.image_conditioned else "class_aware_layer"
    if (config.image_conditioned or config.class_aware_layer is not None) and embed_width_of(model) is None:
        raise ValueError(
            f"{needs_width} needs to know the width of image and class embeddings, and neither this {name} nor a "
            "module in it has a config with projection_dim; put the prompts into the CLIPModel, or set "
            "config.projection_dim."
        )
    if config.image_conditioned and not find_towers(model, "vision"):
        raise ValueError(
            f"image_conditioned needs image embeddings, and {name} has no image tower; use a "
            "CLIPForPromptClassification."
        )
    if config.projection_dim is not None:
        _check_heads(config, model)
    if not config.num_vision_virtual_tokens:
        return
    if not chosen_towers(config, model, "text"):
        raise ValueError("target_modules must name the text embeddings too; they know the template and the classes.")
    towers = chosen_towers(config, model, "vision")
    if not towers:
        problem = "target_modules names none" if config.target_modules is not None else f"{name} has none"
        raise ValueError(
            f"The adapter has vision prompts (num_vision_virtual_tokens={config.num_vision_virtual_tokens}), which "
            f"need an image tower, and {problem}; use a CLIPModel or a CLIPForPromptClassification."
        )
    takes_mask = any(takes_patches(model.get_submodule(tower.embeddings_key)) for tower in towers)
    if takes_mask and not getattr(model, "masks_vision_prompts", False):
        raise ValueError(
            f"{name} masks the patches of an image, and its mask would not cover vision prompts; use "
            "Siglip2ForPromptClassification (from_base), or leave num_vision_virtual_tokens out."
        )


def _check_heads(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    if find_heads(model) is None:
        raise ValueError(
            f"projection_dim puts a projector behind the image tower and class embeddings in place of the text tower, "
            f"for which {type(model).__name__} has no place; use a classifier such as CLIPForPromptClassification, "
            "which AutoModelForPromptClassification.from_base makes of it."
        )


def find_heads(model: nn.Module) -> tuple[str, str] | None:
    """Returns the paths of the image head and the class head of the classifier in a model, `None` without one."""
    heads = {
        kind: next((path for path, module in model.named_modules() if isinstance(unwrapped(module), kind)), None)
        for kind in (ImageHead, ClassHead)
    }
    return None if None in heads.values() else tuple(heads.values())


def _check_targets(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    if config.target_modules is None:
        return
    for key, module in model.named_modules():
        is_target = key and ".base_layer" not in key and check_target_module_exists(config, key)
        is_used = is_text_embeddings(module) or (config.num_vision_virtual_tokens > 0 and is_vision_embeddings(module))
        if is_target and not is_used:
            raise ValueError(
                f"Target module {key!r} is a {type(module).__name__} and holds no CLIP text embeddings; leave "
                "target_modules out to find them."
            )


def check_fits(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Checks that the model has the layers, positions and tokens that a resolved configuration asks for."""
    text = chosen_towers(config, model, "text")
    _check_depth("text_prompt_depth", config.text_prompt_depth, text)
    _check_class_aware_layer(config, text)
    if config.num_vision_virtual_tokens:
        _check_depth("vision_prompt_depth", config.vision_prompt_depth, chosen_towers(config, model, "vision"))
    if config.vision_prompts_from_text:
        _check_coupling(config, text)
    if config.projection_dim is not None and config.class_names is None:
        raise ValueError(
            "projection_dim stores an embedding of the teacher for each class, but no class names are known; give "
            "class_names, or put the adapter into a classifier that has some."
        )
    if config.class_specific and config.class_names is None:
        raise ValueError(
            "class_specific makes vectors for each class, but no class names are known; give class_names, or put the "
            "adapter into a classifier that has some."
        )
    for tower in text:
        _check_room(config, model.get_submodule(tower.embeddings_key))


def _check_depth(field: str, depth: int, towers: list[Tower]) -> None:
    for tower in towers:
        if depth > max(1, len(tower.layer_keys)):
            raise ValueError(
                f"{field}={depth} is more than the {len(tower.layer_keys)} layers beside {tower.embeddings_key!r}; "
                f"take at most that many, or {field}=None for all of them."
            )


def _check_class_aware_layer(config: CLIPPromptTuningConfig, towers: list[Tower]) -> None:
    for tower in towers if config.class_aware_layer is not None else ():
        last = len(tower.layer_keys) - 1
        if config.class_aware_layer > last:
            raise ValueError(
                f"class_aware_layer={config.class_aware_layer} is not there: the last of the layers beside "
                f"{tower.embeddings_key!r} has the index {last}; take an index from 1 to {last}."
            )


def _check_coupling(config: CLIPPromptTuningConfig, text: list[Tower]) -> None:
    if config.num_virtual_tokens != config.num_vision_virtual_tokens:
        raise ValueError(
            "vision_prompts_from_text maps each text vector to one vision prompt, so num_vision_virtual_tokens="
            f"{config.num_vision_virtual_tokens} must equal the number of text vectors, {config.num_virtual_tokens}."
        )
    if len(text) != 1:
        raise ValueError(
            f"vision_prompts_from_text needs one text tower to map from, but there are {len(text)}; name one in "
            "target_modules."
        )


def _check_room(config: CLIPPromptTuningConfig, embeddings: nn.Module) -> None:
    end = config.start_idx + config.num_virtual_tokens
    if end + 1 >= num_positions(embeddings):  # a class token and the end token follow
        raise ValueError(
            f"start_idx={config.start_idx} and num_virtual_tokens={config.num_virtual_tokens} reach position "
            f"{end - 1}, but the text tower has {num_positions(embeddings)} positions and needs at least two after "
            "the vectors, for the class name and the end token; take fewer vectors."
        )
    vocab_size = num_rows(getattr(embeddings, token_table_name(embeddings)))
    highest = max(config.replaced_token_ids + (config.init_token_ids or []), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"The adapter names token {highest}, but the model's vocabulary has {vocab_size} tokens: the adapter "
            "belongs to another base model, or the tokenizer is not this model's."
        )
