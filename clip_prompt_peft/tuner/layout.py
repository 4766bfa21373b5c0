"""From a configuration and a model to the resolved configuration, and to the layout that the text side reads."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass, fields
from itertools import chain

from peft import PromptTuningInit
from torch import nn

from ..templates import (
    DEFAULT_TEMPLATE,
    check_class_names,
    context_text,
    count_begin_tokens,
    encode_words,
    pad_template,
    warn_of_names_without_words,
)
from .config import (
    PROBLEM_TYPES,
    ClassTokenPosition,
    CLIPPromptTuningConfig,
    check_coupled_depths,
    check_deep_prompts_end,
)
from .fingerprint import check_fingerprint, fingerprint_of
from .fits import check_fits, check_towers, chosen_towers
from .hub import COMMIT, HubSettings, hub_settings_of, load_tokenizer
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
    check_towers(config, model)
    resolved = copy.copy(config)
    for name, value in config.set_at_injection.items():
        if getattr(config, name) == value:  # otherwise it was changed since
            setattr(resolved, name, None)
    empty = [field.name for field in fields(config) if getattr(resolved, field.name) is None]
    names = _config_value(model, "class_names")
    if resolved.class_names is not None and resolved.class_names != names and not config.has_weights:
        warn_of_names_without_words(resolved.class_names)
    if resolved.class_names is None and names is not None:
        resolved.class_names = check_class_names(names)
    if resolved.problem_type is None:
        resolved.problem_type = _config_value(model, "problem_type")
    if resolved.projection_dim is not None and resolved.teacher_class_names is None:
        resolved.teacher_class_names = resolved.class_names
    _resolve_depths(resolved, model)
    if not config.has_weights:
        if resolved.prompt_template is None:
            resolved.prompt_template = _config_value(model, "prompt_template") or DEFAULT_TEMPLATE
        tokenizer = _tokenizer_for(config, model)
        _resolve_tokens(resolved, tokenizer)
        _name_base_model(resolved, model, record_token_ids(resolved, tokenizer))
        resolved.set_at_injection = {name: getattr(resolved, name) for name in empty}
    check_fits(resolved, model)
    if config.has_weights:
        _check_base_model(config, model)
        if getattr(model, "tokenizer", None) is not None:  # otherwise, when it writes the first prompts
            check_token_ids(resolved, model.tokenizer)
    return resolved


def warn_of_other_classes(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Warns if an adapter that was loaded takes the place of other class names, or another kind of labels, of a model.

    Args:
        config (`CLIPPromptTuningConfig`):
            The resolved configuration of the adapter.
        model (`torch.nn.Module`):
            The model. Nothing is compared unless it is a classifier that was given class names.
    """
    if not getattr(model, "names_were_given", False):
        return
    adapter, own = config.described, _config_value(model, "class_names")
    if own is not None and config.class_names is not None and list(own) != config.class_names:
        warnings.warn(
            f"{_other_classes(adapter, config.class_names, list(own))} While the adapter is active, labels have to be "
            f"numbered by its names (model.config.label2id). {_how_to_keep(config)}",
            UserWarning,
            stacklevel=2,
        )
    kinds = [kind or PROBLEM_TYPES[0] for kind in (config.problem_type, _config_value(model, "problem_type"))]
    if kinds[0] != kinds[1]:
        warnings.warn(
            f"The adapter {adapter} was trained with problem_type={kinds[0]!r}, and the model has {kinds[1]!r}, which "
            f"decides on loss and probabilities; set model.config.problem_type = {kinds[0]!r} for the adapter's.",
            UserWarning,
            stacklevel=2,
        )


def _other_classes(adapter: str, names: list[str], own: list[str]) -> str:
    """Says how the class names of an adapter differ from those of the model."""
    pairs = enumerate(zip(names, own))
    at = next((label for label, (name, other) in pairs if name != other), min(len(names), len(own)))
    if sorted(names) == sorted(own):
        return (
            f"The adapter {adapter} brings the class names of the model in another order: label {at} is "
            f"{names[at]!r}, not {own[at]!r} as in the model."
        )
    added, missing = ([name for name in some if name not in others] for some, others in ((names, own), (own, names)))
    parts = [f"{len(some)} {what} ({some[:5]})" for some, what in ((added, "new"), (missing, "missing")) if some]
    numbers = "" if len(names) == len(own) else f"; it has {len(names)} classes instead of {len(own)}"
    return f"The adapter {adapter} brings class names of its own in place of the model's: {', '.join(parts)}{numbers}."


def _how_to_keep(config: CLIPPromptTuningConfig) -> str:
    if config.class_specific:
        return "Its vectors belong to its classes; with model.disable_adapter() the model has its own again."
    return "To classify by the model's instead, call model.set_class_names([...]) with these."


def _check_base_model(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Warns if the model is not the one that an adapter was trained on, by its values or else by its name."""
    adapter, trained_on = config.described, _named_base(config)
    if config.base_model_fingerprint is not None:
        check_fingerprint(config.base_model_fingerprint, model, adapter, trained_on)
        return
    name, revision = getattr(model, "name_or_path", None), hub_settings_of(model).revision
    recorded = config.base_model_name_or_path
    if not name or not recorded or os.path.exists(name) or os.path.exists(recorded):
        return  # a folder may hold any model
    # A branch may be at this commit, so only a commit tells another state.
    is_other_state = (
        revision is not None and COMMIT.fullmatch(config.revision or "") is not None and revision != config.revision
    )
    if name != recorded or is_other_state:
        warnings.warn(
            f"The adapter {adapter} was trained on {trained_on}, and is loaded into {name!r}"
            f"{f' at revision {revision!r}' if revision else ''}. It holds no values of its base model to compare. If "
            "the weights differ, its predictions will be worse than they were; load the base model that it names.",
            UserWarning,
            stacklevel=2,
        )


def _name_base_model(config: CLIPPromptTuningConfig, model: nn.Module, token_ids: list[list[int]]) -> None:
    """Sets commit, subfolder and fingerprint of the base model; `token_ids` are those of the adapter's texts."""
    hub = hub_settings_of(model)
    if config.revision not in (None, hub.revision) and hub.revision is not None:
        name = getattr(model, "name_or_path", None)
        if _commit_of(name, hub.at(config.revision, hub.subfolder)) != hub.revision:
            warnings.warn(
                f"The configuration says revision={config.revision!r}, but the model was loaded from {name!r} at "
                f"{hub.revision!r}, which is what the adapter names as its base model's revision.",
                UserWarning,
                stacklevel=2,
            )
    config.revision = hub.revision or config.revision
    config.base_model_subfolder = hub.subfolder or None
    config.base_model_fingerprint = fingerprint_of(model, list(chain.from_iterable(token_ids)))


def _commit_of(name: str | None, hub: HubSettings) -> str | None:
    try:
        return hub.pinned(name).revision
    except OSError:  # offline, or no such revision
        return None


def _named_base(config: CLIPPromptTuningConfig) -> str:
    revision = f" at revision {config.revision!r}" if config.revision else ""
    return f"{config.base_model_name_or_path!r}{revision}"


def _config_value(model: nn.Module, name: str):
    """Returns a field of the model's config, or `None`: a module around a CLIP need not have a config."""
    return getattr(getattr(model, "config", None), name, None)


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
