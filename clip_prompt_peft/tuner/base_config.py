"""What the configurations of all adapters of this package have in common: types, the file, checks of values."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable
from dataclasses import field
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

from peft import PeftConfig

from ..templates import check_template


FORMAT_VERSION = 1  # of adapter_config.json; files without a version are of this one, too
MULTI_LABEL = "multi_label_classification"  # transformers' name for it in `config.problem_type`
PROBLEM_TYPES = ("single_label_classification", MULTI_LABEL)
TEMPERATURES = (1e-3, 1e3)  # CLIP multiplies similarities by 100; this reaches from a factor of 0.1 to 100,000


class CLIPPromptPeftType(str, enum.Enum):
    """The peft types of this package. They have their own enum, since `peft.PeftType` is a closed one.

    It is a member of a `str` enum and not a string, since transformers reads `peft_type.value` when it loads adapters.
    """

    CLIP_PROMPT_TUNING = "CLIP_PROMPT_TUNING"
    CLIP_CLASS_HEAD = "CLIP_CLASS_HEAD"


class CLIPPromptTaskType(str, enum.Enum):
    """The task type of these methods, with which `get_peft_model` returns a [`PeftModelForPromptClassification`]."""

    PROMPT_CLASSIFICATION = "PROMPT_CLASSIFICATION"


# The mixin goes in front of a configuration of peft, which checkers of types must know.
if TYPE_CHECKING:
    ConfigBase = PeftConfig
else:
    ConfigBase = object


class ClassifierAdapterConfig(ConfigBase):
    """
    Mixin for the configuration of an adapter that brings its own classes and template, and records its base model.

    List it before a configuration of peft. The subclass has the fields `class_names`, `prompt_template`,
    `problem_type`, `temperature`, `conformal_scores`, `base_model_subfolder`, `base_model_fingerprint` and
    `format_version`.
    """

    source = None  # the folder or Hub id that it was read from
    class_specific = False
    set_at_injection: dict[str, object]  # field to value, of a configuration that an injection has made

    def check_task_type(self, check_by_peft: Callable[[], None]) -> None:
        """Sets the task type. The check of peft accepts its own task types only, so it runs without ours."""
        self.task_type, task_type = None, self.task_type
        check_by_peft()
        self.task_type = as_member(CLIPPromptTaskType, task_type or "PROMPT_CLASSIFICATION", "task_type")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except TypeError as error:  # a field that cannot be one, such as "self"
            name = str(pretrained_model_name_or_path)
            raise ValueError(f"The configuration of {name!r} is damaged: {error}") from error
        config.source = str(pretrained_model_name_or_path)
        return config

    @property
    def has_weights(self) -> bool:
        """Whether the configuration belongs to saved weights, and cannot start a new adapter."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """What messages call the adapter: the folder or Hub id that it was read from, if that is known."""
        return repr(self.source) if self.source else "of this configuration"


def option(default, help: str) -> Any:
    """Returns the field of a configuration."""
    return field(default=default, metadata={"help": help})


def as_member(enum_class: type[enum.Enum], value, field_name: str):
    """Returns the member of an enum with a value. Raises `ValueError` if there is none."""
    try:
        return enum_class(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in enum_class)
        raise ValueError(f"{field_name} must be one of {allowed}, got {value!r}.") from None


def check_format_version(config) -> None:
    """Raises `ValueError` if a later version of this package wrote a configuration."""
    if not is_int_from(1, config.format_version) or config.format_version > FORMAT_VERSION:
        raise ValueError(
            f"The adapter has the file format {config.format_version!r}, but this version of clip_prompt_peft reads "
            f"formats up to {FORMAT_VERSION}; install a newer version."
        )


def check_kinds(config, kinds: Iterable[tuple[Iterable[str], str, Callable[[Any], bool]]]) -> None:
    """Raises `ValueError` for a field of another type; `kinds` are names of fields, their type in words and a test."""
    for names, kind, is_of_kind in kinds:
        for name in names:
            if not is_of_kind(getattr(config, name)):
                raise ValueError(f"{name} must be {kind}, got {getattr(config, name)!r}.")


def check_templates(config, name: str) -> None:
    """Makes the templates in a field a list. Raises `ValueError` if one is not valid, or there are none."""
    templates = getattr(config, name)
    if templates is None:
        return
    if not isinstance(templates, (list, tuple)) or not templates:
        raise ValueError(f"{name} must be a list of templates, got {templates!r}.")
    for template in templates:
        check_template(template)
    setattr(config, name, list(templates))


def check_calibration(config) -> None:
    """Raises `ValueError` if temperature or conformal scores of a configuration are not valid."""
    check_temperature(config.temperature)
    check_conformal_scores(config.conformal_scores)


def check_temperature(temperature) -> None:
    """Raises `ValueError` unless a temperature is `None` or a number from 0.001 to 1000."""
    low, high = TEMPERATURES
    is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if temperature is not None and not (is_number and low <= temperature <= high):
        raise ValueError(
            f"temperature must be a number from {low:g} to {high:g}, by which logits are divided, or None, got "
            f"{temperature!r}."
        )


def check_conformal_scores(scores) -> None:
    """Raises `ValueError` unless conformal scores are a dictionary or `None`. Its values are checked when used."""
    if scores is not None and not isinstance(scores, dict):
        raise ValueError(f"conformal_scores must be a dictionary that ConformalClassifier.fit made, got {scores!r}.")


def is_int_from(smallest: int, value) -> bool:
    """Returns whether a value is an integer, and no boolean, of at least `smallest`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest
