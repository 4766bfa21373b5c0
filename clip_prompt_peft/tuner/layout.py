"""From a configuration and a model to the resolved configuration, and to the layout that the text side reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

from peft import PromptTuningInit
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..heads import ClassHead, ImageHead
from ..templates import (
    DEFAULT_TEMPLATE,
    check_class_names,
    context_text,
    count_begin_tokens,
    encode_words,
    pad_template,
    warn_of_names_without_words,
)
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
from .base_model import check_base_model, config_value, name_base_model
from .config import ClassTokenPosition, CLIPPromptTuningConfig
from .config_checks import check_coupled_depths, check_deep_prompts_end
from .hub import hub_settings_of, load_tokenizer
from .token_ids import check_token_ids, record_token_ids


@dataclass(frozen=True)
class PromptLayout:
    """
    What the layers and the classifier need to know of an adapter: which vectors stand where, in which texts.

    It is made once for each adapter, when that is injected. The fields have the names and meanings of those of the
    [`CLIPPromptTuningConfig`].
    """

    prompt_template: str
    padded_template: str
    start_idx: int
    num_virtual_tokens: int
    replaced_token_ids: list[int]
    class_names: list[str] | None
    problem_type: str | None
    class_specific: bool
    image_conditioned: bool
    class_token_position: ClassTokenPosition
    class_token_count: str
    text_prompt_depth: int
    class_aware_layer: int | None
    num_vision_virtual_tokens: int
    projection_dim: int | None
    regularizer: str | None
    regularizer_weights: dict[str, float] | None
    teacher_templates: list[str] | None

    @classmethod
    def of(cls, config: CLIPPromptTuningConfig) -> PromptLayout:
        """Returns the layout of a resolved configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def end_idx(self) -> int:
        """The position after the last vector, for class names that stand at the end."""
        return self.start_idx + self.num_virtual_tokens

    @property
    def has_per_text_vectors(self) -> bool:
        """Whether the vectors differ between classes or between images."""
        return self.class_specific or self.image_conditioned

    @property
    def has_per_text_positions(self) -> bool:
        """Whether the positions of the vectors differ between classes."""
        return self.class_token_position is not ClassTokenPosition.END

    @property
    def num_vectors_before_class(self) -> int:
        """The number of vectors in front of the class name."""
        n = self.num_virtual_tokens
        return {"end": n, "middle": n // 2, "front": 0}[self.class_token_position.value]

    @property
    def num_shared_positions(self) -> int | None:
        """The number of positions, from the begin token on, that can be the same in the texts of all classes.

        `None` if the texts alone decide that.
        """
        if not self.class_specific and not self.has_per_text_positions:
            return None
        return self.start_idx + (0 if self.class_specific else self.num_vectors_before_class)

    @property
    def class_prior_templates(self) -> tuple[str, ...] | None:
        """The templates of the zero-shot class embeddings that `class_aware_layer` starts from, `None` without it."""
        if self.class_aware_layer is None:
            return None
        return tuple(self.teacher_templates or (self.prompt_template,))

    @property
    def merge_obstacle(self) -> str | None:
        """The reason why the adapter cannot be folded into the base model, or `None` if it can."""
        obstacles = {
            "it has a projector behind the image tower": self.projection_dim is not None,
            "it has vision prompts": self.num_vision_virtual_tokens > 0,
            "it has prompts in front of deeper layers": self.text_prompt_depth != 1,
            "its vectors depend on the image": self.image_conditioned,
            "its vectors differ from class to class": self.class_specific,
            "its vectors in a deeper layer differ from class to class": self.class_aware_layer is not None,
            "its vectors stand at other positions in every class's text": self.has_per_text_positions,
        }
        return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def resolve(config: CLIPPromptTuningConfig, model: nn.Module) -> CLIPPromptTuningConfig:
    """Returns a copy of a configuration in which all fields are set that depend on the model.

    A configuration from a file has its template, token ids and depths already. It only takes over the class names and
    the problem type of the model, if it has none. What an earlier injection has set is dropped first, since it belongs
    to that model.

    Raises:
        ValueError: If the model cannot take the prompts that the configuration asks for.
    """
    _check_towers(config, model)
    resolved = copy.copy(config)
    for name, value in config.set_at_injection.items():
        if getattr(config, name) == value:  # otherwise it was changed since
            setattr(resolved, name, None)
    empty = [field.name for field in fields(config) if getattr(resolved, field.name) is None]
    names = config_value(model, "class_names")
    if resolved.class_names is not None and resolved.class_names != names and not config.has_weights:
        warn_of_names_without_words(resolved.class_names)
    if resolved.class_names is None and names is not None:
        resolved.class_names = check_class_names(names)
    if resolved.problem_type is None:
        resolved.problem_type = config_value(model, "problem_type")
    if resolved.projection_dim is not None and resolved.teacher_class_names is None:
        resolved.teacher_class_names = resolved.class_names
    _resolve_depths(resolved, model)
    if not config.has_weights:
        if resolved.prompt_template is None:
            resolved.prompt_template = config_value(model, "prompt_template") or DEFAULT_TEMPLATE
        tokenizer = _tokenizer_for(config, model)
        _resolve_tokens(resolved, tokenizer)
        name_base_model(resolved, model, record_token_ids(resolved, tokenizer))
        resolved.set_at_injection = {name: getattr(resolved, name) for name in empty}
    _check_fits(resolved, model)
    if config.has_weights:
        check_base_model(config, model)
        if getattr(model, "tokenizer", None) is not None:  # otherwise, when it writes the first prompts
            check_token_ids(resolved, model.tokenizer)
    return resolved


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


def _resolve_depths(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    for field, kind in (("text_prompt_depth", "text"), ("vision_prompt_depth", "vision")):
        if getattr(config, field) is None:
            depths = [len(tower.layer_keys) for tower in chosen_towers(config, model, kind)]
            if config.vision_prompts_from_text and kind == "vision":
                depths.append(config.text_prompt_depth)  # there is a text prompt for each vision prompt
            setattr(config, field, max(1, min(depths, default=1)))
    check_coupled_depths(config)
    check_deep_prompts_end(config)


def _resolve_tokens(config: CLIPPromptTuningConfig, tokenizer) -> None:
    """Sets the number of vectors, their positions, and the tokens that they replace."""
    num_begin = count_begin_tokens(tokenizer)
    if config.start_idx is None:
        config.start_idx = num_begin
    if config.start_idx < num_begin:
        raise ValueError(
            f"start_idx must be at least {num_begin}, since the tokenizer puts {num_begin} begin token(s) in front of "
            f"a text, got {config.start_idx}; leave it out for the first position behind them."
        )
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
    gap = num_begin + len(context_ids) - start - n  # tokens between the vectors and the class name
    if config.class_token_position is not ClassTokenPosition.END and gap:
        raise ValueError(
            f"class_token_position={config.class_token_position.value!r} moves the class name among the vectors, so "
            f"they must stand right before it, but in the template {config.padded_template!r} they end {gap} tokens "
            "earlier; take more vectors, or a template with fewer words."
        )
    config.replaced_token_ids = context_ids[start - num_begin : start - num_begin + n]
    if config.prompt_tuning_init is PromptTuningInit.TEXT:
        config.init_token_ids = init_ids or config.replaced_token_ids


def _room_in_template(config: CLIPPromptTuningConfig, tokenizer, num_begin: int) -> int:
    room = num_begin + len(encode_words(context_text(config.prompt_template), tokenizer)) - config.start_idx
    if room < 1:
        raise ValueError(
            f"The template {config.prompt_template!r} has no words from position {config.start_idx} up to the class "
            "name, so the number of vectors does not follow from it; give num_virtual_tokens."
        )
    return room


def _tokenizer_for(config: CLIPPromptTuningConfig, model: nn.Module):
    if config.tokenizer_name_or_path is None and getattr(model, "tokenizer", None) is not None:
        return model.tokenizer
    own_name = getattr(model, "name_or_path", None)
    name = config.tokenizer_name_or_path or own_name
    if not name:
        raise ValueError(
            f"The tokenizer is needed to find the template's tokens, but this {type(model).__name__} has no "
            "name_or_path to load it from; set tokenizer_name_or_path in CLIPPromptTuningConfig, or model.tokenizer."
        )
    hub = hub_settings_of(model)
    if name != own_name:
        hub = hub.at(revision=None)
    elif hub.revision is None:
        hub = hub.at(config.revision, hub.subfolder)
    remedy = (
        "A model of transformers does not keep the token, revision, cache_dir or subfolder that it was loaded with: "
        "set model.tokenizer = AutoTokenizer.from_pretrained(..., token=...) before get_peft_model, or make a "
        "classifier first, with AutoModelForPromptClassification.from_pretrained(..., token=...)."
    )
    return load_tokenizer(name, hub, remedy)


def _check_towers(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Checks that the model, or the part of it that `target_modules` names, has the towers that are needed."""
    _check_targets(config, model)
    name = type(model).__name__
    if not find_towers(model, "text"):
        raise ValueError(
            f"{name} has no CLIP text embeddings (a module with a token table and a position table; one like BERT's "
            "only beside an image tower), so there is nothing to tune. Models that have them: CLIPModel, "
            "CLIPTextModel, CLIPTextModelWithProjection, those of MetaCLIP 2, SigLIP and SigLIP 2, ChineseCLIPModel, "
            "AltCLIPModel, Aimv2Model, GroupViTModel, and the classifiers made of them (CLIPForPromptClassification)."
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
            "projection_dim puts a projector behind the image tower, and class embeddings in place of the text tower, "
            f"for which {type(model).__name__} has no place; use a classifier such as CLIPForPromptClassification, "
            "which AutoModelForPromptClassification.from_base makes of it."
        )


def find_heads(model: nn.Module) -> tuple[str, str] | None:
    """Returns the paths of the image head and the class head of the classifier in a model, `None` without one."""
    heads = [
        next((path for path, module in model.named_modules() if isinstance(unwrapped(module), kind)), None)
        for kind in (ImageHead, ClassHead)
    ]
    return None if None in heads else (heads[0], heads[1])


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


def _check_fits(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
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
        if depth > 1 and tower.has_stages:
            raise ValueError(
                f"{field}={depth} puts prompts in front of deeper layers, but those beside {tower.embeddings_key!r} "
                f"belong to stages, between which patches and prompts are put together in groups; take {field}=1."
            )
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
