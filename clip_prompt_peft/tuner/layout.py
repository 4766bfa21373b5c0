"""From a configuration and a model to the layout of the prompts."""

from __future__ import annotations

from typing import Protocol

from peft import PromptTuningInit
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoTokenizer

from ..templates import (
    DEFAULT_TEMPLATE,
    check_class_names,
    context_text,
    count_begin_tokens,
    encode_words,
    pad_template,
)
from ..towers import (
    Tower,
    find_towers,
    is_text_embeddings,
    is_vision_embeddings,
    num_positions,
    takes_patches,
    token_table_name,
)
from .config import CLIPPromptTuningConfig, check_coupled_depths


class PromptLayout(Protocol):
    """What the classifier reads of the active prompt adapter: which texts the vectors expect to stand in.

    An object with these fields is found at `prompt_layout` of the text embedding module; it is `None` there when no
    prompt adapter is in effect. `class_names` may be assigned: it is saved with the adapter.
    """

    class_names: list[str] | None
    problem_type: str | None
    prompt_template: str
    padded_template: str
    start_idx: int
    num_virtual_tokens: int
    replaced_token_ids: list[int]

    # kind of context
    class_specific: bool
    image_conditioned: bool
    has_row_vectors: bool  # either of the two
    has_row_positions: bool  # positions differ from class to class
    class_token_count: str  # "in_prompt" or "alone"
    num_vectors_before_class: int
    num_shared_positions: int | None  # from the begin token on, the same for all classes; None if the texts tell

    num_vision_virtual_tokens: int  # above 0, image embeddings are the adapter's and cannot be made in advance
    regularizer: str | None
    regularizer_weights: dict[str, float] | None
    teacher_templates: list[str] | None


def chosen_towers(config: CLIPPromptTuningConfig, model: nn.Module, kind: str) -> list[Tower]:
    """The towers (`"text"` or `"vision"`) whose embeddings `target_modules` names; all if it names none."""
    towers = find_towers(model, kind)
    if config.target_modules is None:
        return towers
    return [tower for tower in towers if check_target_module_exists(config, tower.embeddings_key)]


def resolve(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Fills in what depends on the model: template, number of vectors, token ids, depths, class names."""
    config.forget_filled_in()
    given = config.to_dict()
    if config.prompt_template is None:
        config.prompt_template = config_value(model, "prompt_template") or DEFAULT_TEMPLATE
    adopt_task(config, model)
    _resolve_depths(config, model)
    tokenizer = _tokenizer_for(config, model)
    num_begin = count_begin_tokens(tokenizer)
    _resolve_start(config, num_begin)
    init_ids = encode_words(config.prompt_tuning_init_text or "", tokenizer)
    if config.num_virtual_tokens is None:
        config.num_virtual_tokens = len(init_ids) or _room_in_template(config, tokenizer, num_begin)
    elif init_ids and len(init_ids) != config.num_virtual_tokens:
        raise ValueError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has {len(init_ids)} tokens, but "
            f"num_virtual_tokens={config.num_virtual_tokens}; they must be equal. Leave num_virtual_tokens out to "
            "take as many as the text has."
        )
    n, start = config.num_virtual_tokens, config.start_idx
    config.padded_template = pad_template(config.prompt_template, n, tokenizer, start)
    context_ids = encode_words(context_text(config.padded_template), tokenizer)
    _check_next_to_class(config, num_begin + len(context_ids))
    config.replaced_token_ids = context_ids[start - num_begin : start - num_begin + n]
    is_text = config.prompt_tuning_init is PromptTuningInit.TEXT
    config.init_token_ids = (init_ids or config.replaced_token_ids) if is_text else None
    config._filled_in = {name: getattr(config, name) for name, value in given.items() if value is None}


def adopt_task(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Takes the classifier's class names and problem type if the configuration has none."""
    names = config_value(model, "class_names")
    if config.class_names is None and names is not None:
        config.class_names = check_class_names(names)
    if config.problem_type is None:
        config.problem_type = config_value(model, "problem_type")


def config_value(model: nn.Module, name: str):
    """A field of the model's config; `None` without such a field, or without a config, as a module around a CLIP."""
    return getattr(getattr(model, "config", None), name, None)


def check_towers(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Raises `ValueError` if the model, or what `target_modules` leaves of it, lacks a tower that is asked for."""
    _check_targets(config, model)
    name = type(model).__name__
    if not find_towers(model, "text"):
        raise ValueError(
            f"{name} has no CLIP text embeddings (a module with a token table and a position table; one like BERT's "
            "only beside an image tower), so there is nothing to tune. Models that have them: CLIPModel, "
            "CLIPTextModel, CLIPTextModelWithProjection, those of MetaCLIP 2, SigLIP and SigLIP 2, ChineseCLIPModel, "
            "AltCLIPModel, and the classifiers made of them (CLIPForPromptClassification, ...)."
        )
    chosen = "target_modules names none" if config.target_modules is not None else f"{name} has none"
    if config.num_vision_virtual_tokens and not chosen_towers(config, model, "text"):
        raise ValueError("target_modules must name the text embeddings too; they know the template and the classes.")
    if config.num_vision_virtual_tokens and not chosen_towers(config, model, "vision"):
        raise ValueError(
            f"The adapter has vision prompts (num_vision_virtual_tokens={config.num_vision_virtual_tokens}), which "
            f"need an image tower, and {chosen}; use a CLIPModel or a CLIPForPromptClassification."
        )
    _check_patches(config, model)
    if config.image_conditioned and not find_towers(model, "vision"):
        raise ValueError(
            f"image_conditioned needs image embeddings, and {name} has no image tower; use a "
            "CLIPForPromptClassification."
        )


def check_fits(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Raises `ValueError` if the (resolved) configuration asks for something that the model does not have."""
    text = chosen_towers(config, model, "text")
    _check_depth("text_prompt_depth", config.text_prompt_depth, text)
    _check_coupling(config, text)
    if config.num_vision_virtual_tokens:
        _check_depth("vision_prompt_depth", config.vision_prompt_depth, chosen_towers(config, model, "vision"))
    if config.class_specific and config.class_names is None:
        raise ValueError(
            "class_specific makes vectors for each class, but no class names are known; give class_names, or put the "
            "adapter into a classifier that has some."
        )
    for tower in text:
        _check_room(config, model.get_submodule(tower.embeddings_key))


def _resolve_depths(config, model) -> None:
    for field, kind in (("text_prompt_depth", "text"), ("vision_prompt_depth", "vision")):
        if getattr(config, field) is None:
            towers = chosen_towers(config, model, kind)
            depths = [len(tower.layer_keys) for tower in towers]
            if config.vision_prompts_from_text and kind == "vision":
                depths.append(config.text_prompt_depth)  # each is a map of a text prompt
            setattr(config, field, max(1, min(depths, default=1)))
    check_coupled_depths(config)


def _resolve_start(config, num_begin: int) -> None:
    if config.start_idx is None:
        config.start_idx = num_begin
    if config.start_idx < num_begin:
        raise ValueError(
            f"start_idx must be at least {num_begin}, since the tokenizer puts {num_begin} begin token(s) in front of "
            f"a text, got {config.start_idx}; leave it out for the first position behind them."
        )


def _room_in_template(config, tokenizer, num_begin: int) -> int:
    context_ids = encode_words(context_text(config.prompt_template), tokenizer)
    room = num_begin + len(context_ids) - config.start_idx
    if room < 1:
        raise ValueError(
            f"The template {config.prompt_template!r} has no words from position {config.start_idx} up to the class "
            "name, so the number of vectors does not follow from it; give num_virtual_tokens."
        )
    return room


def _tokenizer_for(config, model):
    if config.tokenizer_name_or_path is None and getattr(model, "tokenizer", None) is not None:
        return model.tokenizer
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            f"The tokenizer is needed to find the template's tokens, but this {type(model).__name__} has no "
            "name_or_path to load it from; set tokenizer_name_or_path in CLIPPromptTuningConfig."
        )
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _check_next_to_class(config, class_position: int) -> None:
    end = config.start_idx + config.num_virtual_tokens
    if config.has_row_positions and end != class_position:
        raise ValueError(
            f"class_token_position={config.class_token_position.value!r} moves the class name among the vectors, so "
            f"they must stand right before it, but in the template {config.padded_template!r} they end "
            f"{class_position - end} tokens earlier; take more vectors, or a template with fewer words."
        )


def _check_targets(config, model) -> None:
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


def _check_patches(config, model) -> None:
    towers = chosen_towers(config, model, "vision") if config.num_vision_virtual_tokens else []
    takes_mask = any(takes_patches(model.get_submodule(tower.embeddings_key)) for tower in towers)
    if takes_mask and not getattr(model, "masks_vision_prompts", False):
        raise ValueError(
            f"{type(model).__name__} masks the patches of an image, and nothing would tell the mask of vision prompts "
            "behind them; use Siglip2ForPromptClassification (from_base), or leave num_vision_virtual_tokens out."
        )


def _check_depth(field: str, depth: int, towers: list[Tower]) -> None:
    for tower in towers:
        if depth > max(1, len(tower.layer_keys)):
            raise ValueError(
                f"{field}={depth} is more than the {len(tower.layer_keys)} layers beside {tower.embeddings_key!r}; "
                f"take at most that many, or {field}=None for all of them."
            )


def _check_coupling(config, text) -> None:
    if not config.vision_prompts_from_text:
        return
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


def _check_room(config, embeddings: nn.Module) -> None:
    vocab_size = getattr(embeddings, token_table_name(embeddings)).num_embeddings
    end = config.start_idx + config.num_virtual_tokens
    if end + 1 >= num_positions(embeddings):  # a class token and the end token must follow
        raise ValueError(
            f"start_idx={config.start_idx} and num_virtual_tokens={config.num_virtual_tokens} reach position "
            f"{end - 1}, but the text tower has {num_positions(embeddings)} positions and needs at least two after "
            "the vectors, for the class name and the end token; take fewer vectors."
        )
    highest = max(config.replaced_token_ids + (config.init_token_ids or []), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"The adapter names token {highest}, but the model's vocabulary has {vocab_size} tokens: the adapter "
            "belongs to another base model, or the tokenizer is not this model's."
        )
