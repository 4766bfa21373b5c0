"""Configuration of class heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft import LNTuningConfig

from ..templates import check_class_names, check_template
from ..tuner.base_config import (
    FORMAT_VERSION,
    MULTI_LABEL,
    PROBLEM_TYPES,
    ClassifierAdapterConfig,
    CLIPPromptPeftType,
    check_calibration,
    check_format_version,
    check_kinds,
    check_templates,
    is_int_from,
    option,
)
from .presets import head_settings


BLOCK_LAYER_NORMS = "block-layernorms"  # in target_modules, as "all-linear" of peft
LINEAR, CACHE = "linear", "cache"
MAX_KEYS = 2**24  # a file must not be able to ask for any amount of memory


@dataclass
class ClassHeadConfig(ClassifierAdapterConfig, LNTuningConfig):
    """
    Configuration of a [`ClassHeadModel`].

    A class head takes the place of the class embeddings that the text tower computes, for the classes that it knows.
    Other classes are still encoded from their names. It starts from the zero-shot model. With `target_modules`,
    LayerNorms are tuned beside it, by the layers of peft's `LNTuningConfig`, in the same adapter. The published heads
    are combinations of the fields below, see [`~ClassHeadConfig.from_preset`].

    Injecting leaves this object as it is. The adapter has a copy with all fields set, `model.active_peft_config`,
    which is what is saved.

    Args:
        head_type (`"linear"` or `"cache"`, *optional*, defaults to `"linear"`):
            `"linear"` learns a row of weights for each class. Rows are kept as they are and normalized when they are
            used. `"cache"` (Tip-Adapter) keeps the class embeddings of the start, and adds to the logits of an image
            what it has in common with the training images of each class, its keys.
        class_names (`list[str]`, *optional*):
            The class names. Taken from the classifier.
        prompt_template (`str`, *optional*):
            A text with one `{}` for the class name. Taken from the classifier.
        start_templates (`list[str]`, *optional*):
            Several templates, over which the class embeddings of the start are averaged. By default
            `prompt_template` alone.
        normalized_start (`bool`, *optional*, defaults to `False`):
            Whether the rows start from normalized text embeddings (2SFS, Tip-Adapter) or from the mean of them as
            they are (CLAP), which keeps their lengths.
        starts_later (`bool`, *optional*, defaults to `False`):
            Whether the text tower answers for all classes until the head is started from the tuned text embeddings
            ([`TwoStageTuning`] does it), after which this is `False` in the adapter. Needs `target_modules`.
        pull (`bool`, *optional*, defaults to `False`):
            Whether each row is pulled towards its start by an L2 term of the loss, the more the better the zero-shot
            model knows the class (CLAP). [`fit_class_head`] sets its weights before the training.
        train_keys (`bool`, *optional*, defaults to `True`):
            Whether the keys of a cache are trained (Tip-Adapter-F).
        alpha, beta (`float`, *optional*, default to 1.0):
            The weight and the sharpness of a cache.
        target_modules (`list[str]` or `str`, *optional*):
            LayerNorms to tune, by names or a regex, or `"block-layernorms"` for those in the layers of both towers.
            By default none.
        exclude_modules (`list[str]` or `str`, *optional*):
            LayerNorms to leave out.
        problem_type (`str`, *optional*):
            Taken from the classifier.
        num_keys (`int`, *optional*):
            Set by [`fit_class_head`]: the number of keys of a cache.
        embed_width (`int`, *optional*):
            Set at injection: E. A configuration that is made with this field belongs to saved weights and cannot start
            a new adapter.
        temperature, conformal_scores, base_model_subfolder, base_model_fingerprint, format_version:
            As in [`CLIPPromptTuningConfig`].

    Raises:
        ValueError: If a value is not one of those described above, or values exclude each other.
    """

    head_type: str = option(LINEAR, "linear or cache.")
    class_names: list[str] | None = option(None, "Class names; taken from the classifier.")
    prompt_template: str | None = option(None, "Text with one {} for the class name; taken from the classifier.")
    start_templates: list[str] | None = option(None, "Templates that the start is averaged over.")
    normalized_start: bool = option(False, "Whether rows start from normalized text embeddings.")
    starts_later: bool = option(False, "Whether the text tower answers until the head is started.")
    pull: bool = option(False, "Whether each row is pulled towards its start (CLAP).")
    train_keys: bool = option(True, "Whether the keys of a cache are trained.")
    alpha: float = option(1.0, "Weight of a cache.")
    beta: float = option(1.0, "Sharpness of a cache.")
    problem_type: str | None = option(None, "One label per image or several; taken from the classifier.")
    num_keys: int | None = option(None, "Set by fit_class_head: the number of keys of a cache.")
    embed_width: int | None = option(None, "Set at injection: the width of image and class embeddings.")
    temperature: float | None = option(None, "Number by which logits are divided in evaluation; by default none.")
    conformal_scores: dict | None = option(None, "Set by ConformalClassifier.fit: scores of validation images.")
    base_model_subfolder: str | None = option(None, "Set at injection: folder of the base model in its repository.")
    base_model_fingerprint: dict | None = option(None, "Set at injection: some values of the base model.")
    format_version: int = option(FORMAT_VERSION, "Version of the file format.")

    def __post_init__(self):
        self.check_task_type(super().__post_init__)
        self.peft_type = CLIPPromptPeftType.CLIP_CLASS_HEAD
        for check in (_check_types, _check_numbers, _check_texts, _check_combinations):
            check(self)
        self.set_at_injection: dict[str, object] = {}  # field to value, of a configuration that `resolve` has made

    @classmethod
    def from_preset(cls, name: str, **overrides) -> ClassHeadConfig:
        """Creates the configuration of a published head.

        Args:
            name (`str`):
                `"2sfs"`, `"clap"`, `"zs-lp"`, `"tip-adapter"` or `"tip-adapter-f"`.
            overrides:
                Fields with other values than those of the method.

        Raises:
            ValueError: If the name is unknown, or fields exclude each other.

        Example:

        ```py
        >>> config = ClassHeadConfig.from_preset("clap", start_templates=["a photo of a {}.", "a drawing of a {}."])
        ```
        """
        return cls(**{**head_settings(name), **overrides})

    @property
    def has_weights(self) -> bool:
        """Whether the configuration belongs to saved weights: it came with the width that an injection sets."""
        return self.embed_width is not None and "embed_width" not in self.set_at_injection

    @property
    def templates(self) -> list[str]:
        """The templates of the start."""
        return self.start_templates or [self.prompt_template]


def _check_types(config) -> None:
    strings = ("base_model_name_or_path", "base_model_subfolder", "peft_version", "revision", "prompt_template")
    flags = ("inference_mode", "normalized_start", "starts_later", "pull", "train_keys")
    kinds = (
        (strings, "a string", lambda value: value is None or isinstance(value, str)),
        (flags, "True or False", lambda value: isinstance(value, bool)),
        (("base_model_fingerprint", "auto_mapping"), "a dictionary", lambda value: isinstance(value, dict | None)),
        (("target_modules", "exclude_modules"), "a list of strings, or a string", _is_patterns),
    )
    check_kinds(config, kinds)
    check_format_version(config)
    check_calibration(config)


def _check_numbers(config) -> None:
    for name in ("alpha", "beta"):
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
    for name, smallest, largest in (("num_keys", 0, MAX_KEYS), ("embed_width", 1, MAX_KEYS)):
        value = getattr(config, name)
        if value is not None and not (is_int_from(smallest, value) and value <= largest):
            raise ValueError(f"{name} must be an integer from {smallest} to {largest}, got {value!r}.")


def _check_texts(config) -> None:
    if config.head_type not in (LINEAR, CACHE):
        raise ValueError(f"head_type must be {LINEAR!r} or {CACHE!r}, got {config.head_type!r}.")
    if config.class_names is not None:
        config.class_names = check_class_names(config.class_names)
    if config.prompt_template is not None:
        check_template(config.prompt_template)
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type must be None or one of {PROBLEM_TYPES}, got {config.problem_type!r}.")
    check_templates(config, "start_templates")


def _check_combinations(config) -> None:
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} would train other modules beside a class head, which it does "
            "not do; name LayerNorms in target_modules, or train the modules first and merge them."
        )
    if config.exclude_modules and config.target_modules is None:
        raise ValueError(f"exclude_modules={config.exclude_modules!r} leaves out nothing without target_modules.")
    if config.head_type == CACHE:
        unused = {"pull": config.pull, "starts_later": config.starts_later, "target_modules": config.target_modules}
        name = next((name for name, value in unused.items() if value), None)
        if name is not None:
            raise ValueError(
                f"{name}={unused[name]!r} is about rows that are trained, and head_type='cache' has none: its keys "
                "are embeddings of the frozen image tower. Take head_type='linear', or leave it out."
            )
    else:
        others = {"alpha": 1.0, "beta": 1.0, "train_keys": True, "num_keys": None}
        name = next((name for name, default in others.items() if getattr(config, name) != default), None)
        if name is not None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is about the keys of a cache; take head_type='cache', or leave it "
                "out."
            )
    if config.starts_later and config.target_modules is None:
        raise ValueError(
            "starts_later=True waits for text embeddings to be tuned, but without target_modules nothing changes "
            f"them; name LayerNorms, or {BLOCK_LAYER_NORMS!r} for those of all layers."
        )
    if config.pull and config.target_modules is not None:
        raise ValueError(
            "pull=True holds rows near text embeddings of the frozen model, and target_modules changes that model; "
            "leave one of them out."
        )
    if config.problem_type == MULTI_LABEL and (config.pull or config.head_type == CACHE):
        raise ValueError(
            "pull and head_type='cache' read one label of each training image, but problem_type is "
            f"{MULTI_LABEL!r}; take a linear head without pull."
        )


def _is_patterns(value) -> bool:
    if value is None or (isinstance(value, str) and value):
        return True
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) and item for item in value)
