"""Configuration of CLIP prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft import PeftConfig, PromptTuningInit
from torch import nn

from ..templates import check_class_names, check_template
from ..towers import num_tower_layers
from .presets import preset_settings


MULTI_LABEL = "multi_label_classification"  # as transformers calls it in config.problem_type


PROBLEM_TYPES = ("single_label_classification", MULTI_LABEL)


# The names and the weights of the regularizers, which live in `clip_prompt_peft.regularizers`: this package does not
# import them, since it knows nothing of classifiers. A test holds the table equal to them.
REGULARIZER_WEIGHTS = {
    "kgcoop": ("weight",),
    "prograd": ("projection", "temperature"),
    "promptsrc": ("text", "image", "logits"),
}
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
        _check_weights(config.regularizer, config.regularizer_weights or {})
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


def _check_weights(name: str, weights: dict) -> None:
    if name not in REGULARIZER_WEIGHTS:
        raise ValueError(f"regularizer must be one of {sorted(REGULARIZER_WEIGHTS)} or None, got {name!r}.")
    for key, value in weights.items():
        if key not in REGULARIZER_WEIGHTS[name]:
            raise ValueError(f"regularizer_weights of {name!r} may be {list(REGULARIZER_WEIGHTS[name])}, got {key!r}.")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise ValueError(f"regularizer_weights[{key!r}] must be a number of at least 0, got {value!r}.")
        if key == "temperature" and value == 0:
            raise ValueError(f"temperature must be positive, got {value!r}.")


def _is_int_from(least: int, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class CLIPPromptPeftType(str, enum.Enum):
    """Our entry beside `peft.PeftType`, which is a closed enum.

    A member of a `str` enum and not a bare string: transformers asks `peft_type.value` of it when it loads an adapter.
    """

    CLIP_PROMPT_TUNING = "CLIP_PROMPT_TUNING"


class CLIPPromptTaskType(str, enum.Enum):
    """Our entry beside `peft.TaskType`: it selects [`PeftModelForPromptClassification`], which writes a model card."""

    PROMPT_CLASSIFICATION = "PROMPT_CLASSIFICATION"


class ClassTokenPosition(str, enum.Enum):
    """Where the class name stands among the vectors."""

    END = "end"
    MIDDLE = "middle"
    FRONT = "front"


class ClassTokenCount(str, enum.Enum):
    """How the tokens of a class name are counted."""

    IN_PROMPT = "in_prompt"
    ALONE = "alone"


@dataclass
class CLIPPromptTuningConfig(PeftConfig):
    """
    Configuration of [`CLIPPromptTuningModel`]: learnable vectors in place of token embeddings of a frozen CLIP, and
    where asked for, in front of its deeper layers and behind the patches of the image.

    The vectors stand at positions `start_idx ... start_idx + num_virtual_tokens - 1` of every text; position
    embeddings, and all other tokens, stay as they are. The published methods are settings of the fields below: see
    [`~CLIPPromptTuningConfig.from_preset`].

    Args:
        num_virtual_tokens (`int`, *optional*):
            Number of learnable vectors n. By default as many as the init text has tokens, which are all the words of
            the template in front of the class name. Fewer replace the first words only; more make room with
            placeholder words ("X X a photo of a {}."), see [`pad_template`]. 0 is for vision prompts alone.
        prompt_tuning_init (`PromptTuningInit` or `str`, defaults to `"TEXT"`):
            `TEXT` starts from the embeddings of `prompt_tuning_init_text`, or, without one, of the very words that are
            replaced, so that the untrained adapter *is* the zero-shot model. `RANDOM` draws from normal(0, 0.02) as
            CoOp does (https://arxiv.org/abs/2109.01134). `SAMPLE_VOCAB` draws random rows of the vocabulary.
        prompt_tuning_init_text (`str`, *optional*):
            Text of exactly `num_virtual_tokens` tokens to start from. Only with `TEXT`.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer for the template and the init text. By default the model's own (its `tokenizer` attribute if it
            has one, otherwise loaded from the model's `name_or_path`).
        prompt_template (`str`, *optional*):
            Text with one `{}` for the class name. Defaults to the classifier's own template, `"a photo of a {}."` for
            any other model.
        start_idx (`int`, *optional*):
            First replaced position. By default the one behind the begin token: 1, or 0 where the tokenizer has none.
        class_names (`list[str]`, *optional*):
            Filled in from the classifier, so that the adapter alone makes a classifier.
        problem_type (`str`, *optional*):
            Filled in from the classifier's config: `"multi_label_classification"` if an image has several labels.
        class_specific (`bool`, defaults to `False`):
            Vectors of their own for every class, (C, n, D), tied to these `class_names` (CoOp's CSC).
        class_token_position (`"end"`, `"middle"` or `"front"`, defaults to `"end"`):
            Where the class name stands: behind all vectors, behind the first n // 2, or before all (CoOp).
        class_token_count (`"in_prompt"` or `"alone"`, defaults to `"in_prompt"`):
            With `"middle"` and `"front"`, which tokens are the class name: those that it has inside its prompt, or as
            many as it has on its own. They differ where the name merges with what follows ("C++." ends in one token
            "+."): `"alone"` then leaves the last token of the name behind the vectors, as CoOp's code does.
        text_prompt_depth (`int`, *optional*, defaults to 1):
            Number of layers with text prompts: 1 is the input only; with more, the states at the vectors' positions
            are replaced by fresh vectors before each further layer. `None` means every layer.
        num_vision_virtual_tokens (`int`, defaults to 0):
            Number of vectors appended behind the patches of the image.
        vision_prompt_depth (`int`, *optional*, defaults to 1):
            As `text_prompt_depth`, for the image tower (VPT shallow and deep).
        vision_prompts_from_text (`bool`, defaults to `False`):
            Vision prompts are linear maps of the text prompts, one map for each depth (MaPLe).
        image_conditioned (`bool`, defaults to `False`):
            A small network shifts the vectors by what it sees in the image embedding (CoCoOp).
        regularizer (`str`, *optional*):
            A loss term beside the cross entropy: `"kgcoop"`, `"prograd"` (needs [`ProGradTrainer`]) or `"promptsrc"`;
            see [`losses`].
        regularizer_weights (`dict[str, float]`, *optional*):
            Its weights; those that are left out are the paper's.
        teacher_templates (`list[str]`, *optional*):
            Templates of the zero-shot class embeddings that it compares with. By default the regularizer's own, or
            `prompt_template`.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the embedding modules. By default every one of the model. Deep prompts go to the towers
            whose embeddings are chosen.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names or regex of modules to leave out.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save, such as `["text_projection"]`.
        padded_template (`str`, *optional*):
            Filled in: the template with room for all vectors.
        replaced_token_ids (`list[int]`, *optional*):
            Filled in: the n token ids whose embeddings are replaced. With them no tokenizer is needed to load. A
            configuration that is made with them belongs to saved weights and starts nothing: make a new adapter from
            a configuration without them.
        init_token_ids (`list[int]`, *optional*):
            Filled in: the n token ids that `TEXT` started from.

    Raises:
        ValueError: for a value outside of what is described above.
    """

    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Number of learnable vectors; by default as many as the init text has tokens."}
    )
    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.TEXT, metadata={"help": "How the vectors start: TEXT, RANDOM or SAMPLE_VOCAB."}
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Text of exactly num_virtual_tokens tokens to start from. Only with TEXT."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for template and init text; by default the model's own."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text with one {} for the class name; by default 'a photo of a {}.'."}
    )
    start_idx: int | None = field(
        default=None, metadata={"help": "First replaced position; by default the one behind the begin token."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Class names, filled in from the classifier."}
    )
    problem_type: str | None = field(
        default=None, metadata={"help": "One label per image or several, filled in from the classifier."}
    )
    class_specific: bool = field(default=False, metadata={"help": "Vectors of their own for every class."})
    class_token_position: ClassTokenPosition | str = field(
        default=ClassTokenPosition.END, metadata={"help": "Where the class name stands: end, middle or front."}
    )
    class_token_count: ClassTokenCount | str = field(
        default=ClassTokenCount.IN_PROMPT,
        metadata={"help": "Tokens of a class name: as it stands in its prompt (in_prompt), or alone as CoOp counts."},
    )
    text_prompt_depth: int | None = field(
        default=1, metadata={"help": "Number of text layers with prompts; 1 is the input only, None every layer."}
    )
    num_vision_virtual_tokens: int = field(
        default=0, metadata={"help": "Number of vectors appended behind the patches of the image."}
    )
    vision_prompt_depth: int | None = field(
        default=1, metadata={"help": "Number of image layers with prompts; 1 is the input only, None every layer."}
    )
    vision_prompts_from_text: bool = field(
        default=False, metadata={"help": "Make the vision prompts linear maps of the text prompts."}
    )
    image_conditioned: bool = field(
        default=False, metadata={"help": "Shift the text vectors by what a small network sees in the image embedding."}
    )
    regularizer: str | None = field(
        default=None, metadata={"help": "Loss term beside the cross entropy: kgcoop, prograd or promptsrc."}
    )
    regularizer_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Weights of the regularizer; those left out are the paper's."}
    )
    teacher_templates: list[str] | None = field(
        default=None,
        metadata={"help": "Templates of the zero-shot class embeddings that the regularizer compares with."},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Embedding modules to wrap; by default every one of the model."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and to save with the vectors."}
    )
    padded_template: str | None = field(
        default=None, metadata={"help": "Filled in: the template with room for all vectors."}
    )
    replaced_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Filled in: ids of the tokens whose embeddings are replaced."}
    )
    init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Filled in: ids of the tokens that TEXT started from."}
    )

    def __post_init__(self):
        # peft knows no task type of others, so it checks without ours.
        self.task_type, task_type = None, self.task_type
        super().__post_init__()
        self.task_type = as_member(CLIPPromptTaskType, task_type or "PROMPT_CLASSIFICATION", "task_type")
        self.peft_type = CLIPPromptPeftType.CLIP_PROMPT_TUNING
        self.prompt_tuning_init = as_member(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        self.class_token_position = as_member(ClassTokenPosition, self.class_token_position, "class_token_position")
        self.class_token_count = as_member(ClassTokenCount, self.class_token_count, "class_token_count")
        check_config(self)
        # Ids that came through the constructor came from a file: they are final, no tokenizer is asked again, and
        # weights are expected to follow.
        self._loaded = self.replaced_token_ids is not None
        self._filled_in: dict[str, object] = {}
        if self._loaded:
            check_resolved(self)

    @classmethod
    def from_preset(cls, name: str, model: nn.Module | None = None, **overrides) -> CLIPPromptTuningConfig:
        """The settings of a published method.

        Args:
            name: one of `clip_prompt_peft.presets.PRESETS`.
            model: a CLIP. The papers' depths are for towers of 12 layers; where this one has fewer than a method asks
                for, its prompts go to all of them. Without a model such a depth is refused at injection.
            overrides: fields to set otherwise.

        Raises:
            ValueError: unknown name, or fields that do not go together.

        Example:

        ```py
        >>> config = CLIPPromptTuningConfig.from_preset("maple", class_names=["cat", "dog"])
        ```
        """
        num_layers = () if model is None else (num_tower_layers(model, "text"), num_tower_layers(model, "vision"))
        return cls(**{**preset_settings(name, *num_layers), **overrides})

    @property
    def has_row_vectors(self) -> bool:
        """Whether the vectors differ from class to class or from image to image."""
        return self.class_specific or self.image_conditioned

    @property
    def has_row_positions(self) -> bool:
        """Whether the positions of the vectors differ from class to class."""
        return self.class_token_position is not ClassTokenPosition.END

    @property
    def has_shared_prefix(self) -> bool:
        """Whether begin token and vectors are the same, at the same positions, in the texts of all classes.

        An image-conditioned adapter has such a prefix for each image.
        """
        return not self.class_specific and not self.has_row_positions

    @property
    def num_vectors_before_class(self) -> int:
        """How many of the vectors stand before the class name."""
        n = self.num_virtual_tokens
        return {"end": n, "middle": n // 2, "front": 0}[self.class_token_position.value]

    @property
    def num_shared_positions(self) -> int | None:
        """How many positions from the begin token on can be the same in the texts of all classes; `None` if the texts
        alone decide that."""
        if self.has_shared_prefix:
            return None
        return self.start_idx + (0 if self.class_specific else self.num_vectors_before_class)

    @property
    def merge_obstacle(self) -> str | None:
        """Why the adapter cannot be folded into the base model; `None` if it can."""
        if self.num_vision_virtual_tokens:
            return "it has vision prompts"
        if self.text_prompt_depth != 1:
            return "it has prompts in front of deeper layers"
        if self.image_conditioned:
            return "its vectors depend on the image"
        if self.class_specific:
            return "its vectors differ from class to class"
        if self.has_row_positions:
            return "its vectors stand at other positions in every class's text"
        return None

    def forget_filled_in(self) -> None:
        """Takes back what an injection filled in: it belongs to that model, and this one may go into another."""
        for name, value in self._filled_in.items():
            if getattr(self, name) == value:  # otherwise the user has set it since
                setattr(self, name, None)
        self._filled_in = {}
