"""Configuration of CLIP prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from peft import PeftConfig, PromptTuningInit
from torch import nn

from ..templates import check_class_names, check_template
from ..towers import num_tower_layers
from .base_config import (
    FORMAT_VERSION,
    PROBLEM_TYPES,
    ClassifierAdapterConfig,
    CLIPPromptPeftType,
    as_member,
    check_format_version,
    is_int_from,
    option,
)
from .presets import preset_settings


MAX_PROJECTION = 8192  # the widest embeddings of known models have 2048
MAX_TOKENS = 1000  # the literature uses up to 200; a file must not be able to ask for any amount of memory

# The names and weights of the regularizers in `clip_prompt_peft.regularizers`. They are repeated here since the tuner
# knows nothing of classifiers and their losses; a test compares the two.
REGULARIZER_WEIGHTS = {
    "kgcoop": ("weight",),
    "prograd": ("projection", "temperature"),
    "promptsrc": ("text", "image", "logits"),
}


class ClassTokenPosition(str, enum.Enum):
    """Where the class name stands among the virtual tokens."""

    END = "end"
    MIDDLE = "middle"
    FRONT = "front"


class ClassTokenCount(str, enum.Enum):
    """How the tokens of a class name are counted."""

    IN_PROMPT = "in_prompt"
    ALONE = "alone"


@dataclass
class CLIPPromptTuningConfig(ClassifierAdapterConfig, PeftConfig):
    """
    Configuration of a [`CLIPPromptTuningModel`].

    Learnable vectors replace the token embeddings at positions `start_idx ... start_idx + num_virtual_tokens - 1` of
    every text. Position embeddings and all other tokens stay as they are. Further vectors can be inserted before
    deeper layers and after the image patches. The published methods are combinations of the fields below, see
    [`~CLIPPromptTuningConfig.from_preset`].

    Injecting leaves this object as it is, so that it can serve several models, whose templates, tokens and depths
    differ. The adapter has a copy with all fields set, `model.active_peft_config`, which is what is saved. So
    `model.peft_config["default"] is config` is false, unlike for other methods of peft. Changing fields of the copy
    has no effect on the model: use `set_class_names` for other classes, and `active_regularizers` of the classifier
    for other weights.

    Args:
        num_virtual_tokens (`int`, *optional*):
            The number n of learnable vectors. By default the number of tokens of the init text, which are all words of
            the template in front of the class name. A smaller number replaces only the first words, a larger number
            makes room with placeholder words ("X X a photo of a {}."), see [`pad_template`]. 0 is for vision prompts
            alone.
        prompt_tuning_init (`PromptTuningInit` or `str`, *optional*, defaults to `"TEXT"`):
            `TEXT` starts from the embeddings of `prompt_tuning_init_text` or, without one, of the words that are
            replaced, so that the untrained adapter equals the zero-shot model. `RANDOM` draws from normal(0, 0.02), as
            CoOp does (https://arxiv.org/abs/2109.01134). `SAMPLE_VOCAB` draws random rows of the token table.
        prompt_tuning_init_text (`str`, *optional*):
            A text of exactly `num_virtual_tokens` tokens to start from. Only with `TEXT`.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer for the template and the init text. By default the model's `tokenizer` attribute if it has
            one, otherwise the tokenizer at the model's `name_or_path`.
        prompt_template (`str`, *optional*):
            A text with one `{}` for the class name. Defaults to the template of the classifier, and to
            `"a photo of a {}."` for any other model.
        start_idx (`int`, *optional*):
            The first replaced position. By default the one after the begin token: 1, or 0 without a begin token.
        class_names (`list[str]`, *optional*):
            The class names. Taken from the classifier, so that the adapter alone is enough to build a classifier.
        problem_type (`str`, *optional*):
            Taken from the classifier: `"multi_label_classification"` if an image can have several labels.
        class_specific (`bool`, *optional*, defaults to `False`):
            Whether every class has its own vectors (C, n, D), which ties the adapter to its `class_names` (CoOp CSC).
        class_token_position (`"end"`, `"middle"` or `"front"`, *optional*, defaults to `"end"`):
            Whether the class name stands after all vectors, after the first n // 2, or before all of them (CoOp).
        class_token_count (`"in_prompt"` or `"alone"`, *optional*, defaults to `"in_prompt"`):
            How the tokens of a class name are counted for `"middle"` and `"front"`: as many as it has inside of its
            prompt, or as many as it has on its own. The numbers differ if the name merges with the text after it
            ("C++." ends with the single token "+."). With `"alone"`, the last token of such a name stays after the
            vectors, as in CoOp's code.
        text_prompt_depth (`int`, *optional*, defaults to 1):
            The number of text layers with prompts. 1 is the input only. For each further layer, the hidden states at
            the positions of the vectors are replaced by new vectors before the layer. `None` means every layer.
        num_vision_virtual_tokens (`int`, *optional*, defaults to 0):
            The number of vectors that are appended to the image patches.
        vision_prompt_depth (`int`, *optional*, defaults to 1):
            The number of image layers with prompts (VPT shallow and deep). `None` means every layer.
        class_aware_layer (`int`, *optional*):
            The text layer, counted from 0, before which the hidden states at the positions of the vectors are replaced
            by vectors of each class. A small network computes them from the zero-shot embedding of the class (TCP), so
            they exist for new classes, too. Layers before it see the learnable vectors. By default there is none.
        vision_prompts_from_text (`bool`, *optional*, defaults to `False`):
            Whether the vision prompts are linear maps of the text prompts, with one map for each depth (MaPLe).
        image_conditioned (`bool`, *optional*, defaults to `False`):
            Whether a small network shifts the vectors depending on the image embedding (CoCoOp).
        projection_dim (`int`, *optional*):
            The width of the class embeddings of a teacher (PromptKD). A small network maps image embeddings to this
            width, and images are compared with the embeddings of the teacher, which are saved with the adapter. The
            text tower is not used, so `num_virtual_tokens` must be 0. By default there is no teacher.
        regularizer (`str`, *optional*):
            A loss term beside the cross entropy: `"kgcoop"`, `"prograd"` (needs [`ProGradTrainer`]) or `"promptsrc"`.
        regularizer_weights (`dict[str, float]`, *optional*):
            The weights of the regularizer. Those that are left out have the values of the paper.
        teacher_templates (`list[str]`, *optional*):
            The templates of the zero-shot class embeddings that the regularizer compares with, and from which
            `class_aware_layer` starts. By default those of the regularizer, or `prompt_template`.
        target_modules (`list[str]` or `str`, *optional*):
            The names, or a regex, of the embedding modules. By default all of the model. Deep prompts are put into the
            towers whose embeddings are chosen.
        exclude_modules (`list[str]` or `str`, *optional*):
            The names, or a regex, of modules to leave out.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save, such as `["text_projection"]`.
        teacher_class_names (`list[str]`, *optional*):
            Set at injection: the names of the classes that the adapter has embeddings of a teacher for. Those in
            `class_names` are among them.
        padded_template (`str`, *optional*):
            Set at injection: the template with room for all vectors.
        replaced_token_ids (`list[int]`, *optional*):
            Set at injection: the n token ids whose embeddings are replaced, so that loading needs no tokenizer. A
            configuration that is made with this field belongs to saved weights and cannot start a new adapter.
        init_token_ids (`list[int]`, *optional*):
            Set at injection: the n token ids that `TEXT` started from.
        base_model_subfolder (`str`, *optional*):
            Set at injection: the folder of the base model in its repository. Its commit is set as `revision`.
        base_model_fingerprint (`dict`, *optional*):
            Set at injection: some values of the base model, see `fingerprint.py`.
        tokenizer_fingerprint (`dict`, *optional*):
            Set at injection: the token ids of the adapter's texts, see `token_ids.py`.
        format_version (`int`, *optional*, defaults to 1):
            The version of the file format.

    Raises:
        ValueError: If a value is not one of those described above, or values exclude each other.
    """

    num_virtual_tokens: int | None = option(None, "Number of vectors; by default that of the init text's tokens.")
    prompt_tuning_init: PromptTuningInit | str = option(PromptTuningInit.TEXT, "TEXT, RANDOM or SAMPLE_VOCAB.")
    prompt_tuning_init_text: str | None = option(None, "Text of num_virtual_tokens tokens to start from, with TEXT.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer for template and init text; by default the model's.")
    prompt_template: str | None = option(None, "Text with one {} for the class name; by default 'a photo of a {}.'.")
    start_idx: int | None = option(None, "First replaced position; by default the one after the begin token.")
    class_names: list[str] | None = option(None, "Class names; taken from the classifier.")
    problem_type: str | None = option(None, "One label per image or several; taken from the classifier.")
    class_specific: bool = option(False, "Whether every class has its own vectors.")
    class_token_position: ClassTokenPosition | str = option(ClassTokenPosition.END, "end, middle or front.")
    class_token_count: ClassTokenCount | str = option(
        ClassTokenCount.IN_PROMPT, "Count the tokens of a class name inside of its prompt (in_prompt) or alone."
    )
    text_prompt_depth: int | None = option(1, "Number of text layers with prompts; None means every layer.")
    class_aware_layer: int | None = option(None, "Text layer before which vectors of each class come in (TCP).")
    num_vision_virtual_tokens: int = option(0, "Number of vectors that are appended to the image patches.")
    vision_prompt_depth: int | None = option(1, "Number of image layers with prompts; None means every layer.")
    vision_prompts_from_text: bool = option(False, "Whether vision prompts are linear maps of the text prompts.")
    image_conditioned: bool = option(False, "Whether a small network shifts the vectors depending on the image.")
    projection_dim: int | None = option(None, "Width of a teacher's class embeddings to map images to (PromptKD).")
    regularizer: str | None = option(None, "Loss term beside the cross entropy: kgcoop, prograd or promptsrc.")
    regularizer_weights: dict[str, float] | None = option(None, "Weights of the regularizer; by default the paper's.")
    teacher_templates: list[str] | None = option(None, "Templates that the regularizer compares with.")
    target_modules: list[str] | str | None = option(None, "Embedding modules to wrap; by default all of the model.")
    exclude_modules: list[str] | str | None = option(None, "Modules to leave out.")
    modules_to_save: list[str] | None = option(None, "Further modules to train and to save with the vectors.")
    teacher_class_names: list[str] | None = option(None, "Set at injection: classes with embeddings of a teacher.")
    padded_template: str | None = option(None, "Set at injection: the template with room for all vectors.")
    replaced_token_ids: list[int] | None = option(None, "Set at injection: the ids of the replaced tokens.")
    init_token_ids: list[int] | None = option(None, "Set at injection: the token ids that TEXT started from.")
    base_model_subfolder: str | None = option(None, "Set at injection: folder of the base model in its repository.")
    base_model_fingerprint: dict | None = option(None, "Set at injection: some values of the base model.")
    tokenizer_fingerprint: dict | None = option(None, "Set at injection: the token ids of the adapter's texts.")
    format_version: int = option(FORMAT_VERSION, "Version of the file format.")

    def __post_init__(self):
        self.check_task_type(super().__post_init__)
        self.peft_type = CLIPPromptPeftType.CLIP_PROMPT_TUNING
        self.prompt_tuning_init = as_member(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        self.class_token_position = as_member(ClassTokenPosition, self.class_token_position, "class_token_position")
        self.class_token_count = as_member(ClassTokenCount, self.class_token_count, "class_token_count")
        checks = (_check_types, _check_numbers, _check_texts, _check_text_prompts, _check_vision_prompts)
        for check in (*checks, _check_class_aware, _check_projection, _check_regularizer, _check_teacher_templates):
            check(self)
        self.checked_tokenizer: int | None = None  # the id() of the tokenizer that `tokenizer_fingerprint` fits
        self.set_at_injection: dict[str, object] = {}  # field to value, of a configuration that `resolve` has made
        if self.has_weights:
            _check_resolved(self)

    @classmethod
    def from_preset(cls, name: str, model: nn.Module | None = None, **overrides) -> CLIPPromptTuningConfig:
        """Creates the configuration of a published method.

        Args:
            name (`str`):
                One of `clip_prompt_peft.PRESETS`.
            model (`torch.nn.Module`, *optional*):
                A CLIP. The depths of the papers are for towers of 12 layers. If the model has fewer, prompts are put
                into all of them; without a model, such a depth raises an error at injection.
            overrides:
                Fields with other values than those of the method.

        Raises:
            ValueError: If the name is unknown, or fields exclude each other.

        Example:

        ```py
        >>> config = CLIPPromptTuningConfig.from_preset("maple", class_names=["cat", "dog"])
        ```
        """
        num_layers = () if model is None else (num_tower_layers(model, "text"), num_tower_layers(model, "vision"))
        return cls(**{**preset_settings(name, *num_layers), **overrides})

    @property
    def has_weights(self) -> bool:
        """Whether the configuration belongs to saved weights: it came with the token ids that an injection sets."""
        return self.replaced_token_ids is not None and "replaced_token_ids" not in self.set_at_injection

    @property
    def has_shared_prefix(self) -> bool:
        """Whether begin token and vectors are the same, at the same positions, in the texts of all classes."""
        return not self.class_specific and self.class_token_position is ClassTokenPosition.END


def check_coupled_depths(config: CLIPPromptTuningConfig) -> None:
    """Raises `ValueError` if vision prompts reach deeper than the text prompts that they are mapped from."""
    text, vision = config.text_prompt_depth, config.vision_prompt_depth
    if config.vision_prompts_from_text and None not in (text, vision) and vision > text:
        raise ValueError(
            f"vision_prompts_from_text maps the text prompts of each depth, but vision_prompt_depth={vision} goes "
            f"beyond text_prompt_depth={text}; make them equal."
        )


def check_deep_prompts_end(config: CLIPPromptTuningConfig) -> None:
    """Raises `ValueError` if deep prompts would overwrite the vectors of the classes."""
    layer, depth = config.class_aware_layer, config.text_prompt_depth
    if layer is not None and depth is not None and depth > layer:
        raise ValueError(
            f"class_aware_layer={layer} puts in vectors of each class, which the deep prompts of text_prompt_depth="
            f"{depth} (layers 0 ... {depth - 1}) would overwrite; take a text_prompt_depth of at most {layer}."
        )


def _check_types(config) -> None:
    # The values may come from a file; of a wrong type, they would fail somewhere deep inside of other libraries.
    strings = ("base_model_name_or_path", "base_model_subfolder", "peft_version", "regularizer", "revision")
    strings = (*strings, "tokenizer_name_or_path")
    dictionaries = ("auto_mapping", "base_model_fingerprint", "regularizer_weights", "tokenizer_fingerprint")
    flags = ("class_specific", "image_conditioned", "inference_mode", "vision_prompts_from_text")
    for names, kind, is_of_kind in (
        (strings, "a string", lambda value: value is None or isinstance(value, str)),
        (flags, "True or False", lambda value: isinstance(value, bool)),
        (("target_modules", "exclude_modules"), "a list of strings, or a string", _is_patterns),
        (("modules_to_save",), "a list of strings", lambda value: _is_patterns(value) and not isinstance(value, str)),
        (
            dictionaries,
            "a dictionary",
            lambda value: isinstance(value, dict | None),
        ),
        (("init_token_ids",), "a list of token ids", lambda value: value is None or _is_token_ids(value)),
    ):
        for name in names:
            if not is_of_kind(getattr(config, name)):
                raise ValueError(f"{name} must be {kind}, got {getattr(config, name)!r}.")
    check_format_version(config)


def _check_numbers(config) -> None:
    n = config.num_virtual_tokens
    smallest = 1 if config.num_vision_virtual_tokens == 0 and config.projection_dim is None else 0
    if n is not None and not is_int_from(smallest, n):
        hint = " (0, no text vectors, only with num_vision_virtual_tokens or projection_dim)" if n == 0 else ""
        raise ValueError(f"num_virtual_tokens must be a positive integer, got {n!r}{hint}.")
    if config.start_idx is not None and not is_int_from(0, config.start_idx):
        raise ValueError(
            "start_idx must be an integer of at least 0, or None for the position after the begin token, got "
            f"{config.start_idx!r}."
        )
    if not is_int_from(0, config.num_vision_virtual_tokens):
        raise ValueError(
            f"num_vision_virtual_tokens must be an integer of at least 0, got {config.num_vision_virtual_tokens!r}."
        )
    for name in ("num_virtual_tokens", "num_vision_virtual_tokens"):
        if (getattr(config, name) or 0) > MAX_TOKENS:
            raise ValueError(f"{name} must be at most {MAX_TOKENS}, got {getattr(config, name)}.")
    for name in ("text_prompt_depth", "vision_prompt_depth"):
        depth = getattr(config, name)
        if depth is not None and not is_int_from(1, depth):
            raise ValueError(f"{name} must be a positive integer, or None for every layer, got {depth!r}.")


def _check_texts(config) -> None:
    if config.prompt_template is not None:
        check_template(config.prompt_template)
    if config.class_names is not None:
        config.class_names = check_class_names(config.class_names)
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type must be None or one of {PROBLEM_TYPES}, got {config.problem_type!r}.")
    text = config.prompt_tuning_init_text
    if text is not None and config.prompt_tuning_init is not PromptTuningInit.TEXT:
        raise ValueError(
            f"prompt_tuning_init_text={text!r} is only used with prompt_tuning_init='TEXT', got "
            f"{config.prompt_tuning_init.value!r}."
        )
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise ValueError(f"prompt_tuning_init_text must hold words, got {text!r}.")


def _check_text_prompts(config) -> None:
    if config.num_virtual_tokens == 0:
        unused = {
            "class_specific": False,
            "image_conditioned": False,
            "text_prompt_depth": 1,
            "prompt_tuning_init_text": None,
            "class_token_position": ClassTokenPosition.END,
            "class_aware_layer": None,
        }
        for name, default in unused.items():
            value = getattr(config, name)
            if value != default:
                shown = value.value if isinstance(value, enum.Enum) else value
                raise ValueError(
                    f"{name}={shown!r} is about text vectors, but num_virtual_tokens=0 asks for none; leave one of "
                    "them out."
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


def _check_class_aware(config) -> None:
    layer = config.class_aware_layer
    if layer is None:
        return
    if not is_int_from(1, layer):
        raise ValueError(
            "class_aware_layer must be the index of a text layer from 1 on, or None for none, got "
            f"{layer!r}. For vectors of each class in the input, use class_specific."
        )
    if config.image_conditioned or not config.has_shared_prefix:
        raise ValueError(
            "class_aware_layer needs class_token_position='end', class_specific=False and image_conditioned=False: up "
            "to that layer, the vectors are the same, and stand at the same positions, in the texts of all classes."
        )
    check_deep_prompts_end(config)


def _check_projection(config) -> None:
    width = config.projection_dim
    if width is None:
        return
    if not is_int_from(1, width) or width > MAX_PROJECTION:
        raise ValueError(f"projection_dim must be an integer from 1 to {MAX_PROJECTION}, or None, got {width!r}.")
    if config.num_virtual_tokens != 0:
        raise ValueError(
            f"projection_dim={width} compares images with the class embeddings of a teacher, so that text vectors "
            f"would have no effect; set num_virtual_tokens=0, got {config.num_virtual_tokens!r}."
        )
    if config.regularizer is not None:
        raise ValueError(
            f"regularizer={config.regularizer!r} compares with the zero-shot model, whose embeddings are not of the "
            f"width projection_dim={width}; leave one of them out."
        )
    if config.teacher_class_names is not None:
        config.teacher_class_names = check_class_names(config.teacher_class_names)
        unknown = [name for name in config.class_names or () if name not in config.teacher_class_names]
        if unknown:
            raise ValueError(f"class_names holds {unknown[0]!r}, which is not in teacher_class_names.")


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
            "vision_prompts_from_text needs vision prompts; set num_vision_virtual_tokens to num_virtual_tokens."
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


def _check_regularizer(config) -> None:
    if config.regularizer is None:
        for name in ("regularizer_weights", "teacher_templates"):
            is_used = name == "teacher_templates" and config.class_aware_layer is not None
            if getattr(config, name) is not None and not is_used:
                raise ValueError(f"{name}={getattr(config, name)!r} needs a regularizer; name one.")
        return
    if config.regularizer not in REGULARIZER_WEIGHTS:
        raise ValueError(
            f"regularizer must be one of {sorted(REGULARIZER_WEIGHTS)} or None, got {config.regularizer!r}."
        )
    allowed = list(REGULARIZER_WEIGHTS[config.regularizer])
    for key, value in (config.regularizer_weights or {}).items():
        if key not in allowed:
            raise ValueError(f"regularizer_weights of {config.regularizer!r} may be {allowed}, got {key!r}.")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise ValueError(f"regularizer_weights[{key!r}] must be a number of at least 0, got {value!r}.")
        if key == "temperature" and value == 0:
            raise ValueError(f"temperature must be positive, got {value!r}.")


def _check_teacher_templates(config) -> None:
    templates = config.teacher_templates
    if templates is not None:
        if not isinstance(templates, (list, tuple)) or not templates:
            raise ValueError(f"teacher_templates must be a list of templates, got {templates!r}.")
        for template in templates:
            check_template(template)
        config.teacher_templates = list(templates)


def _check_resolved(config) -> None:
    ids, n = config.replaced_token_ids, config.num_virtual_tokens
    if not _is_token_ids(ids) or len(ids) != n:
        raise ValueError(
            f"replaced_token_ids must be {n} token ids, one for each virtual token, got {ids!r}; the adapter's "
            "configuration is damaged."
        )
    check_template(config.padded_template)
    if config.start_idx is None:
        raise ValueError("start_idx must be given with replaced_token_ids; the adapter's configuration is damaged.")
    if (config.projection_dim is None) != (config.teacher_class_names is None):
        raise ValueError(
            f"projection_dim={config.projection_dim!r} and teacher_class_names={config.teacher_class_names!r} must be "
            "given together or not at all; the adapter's configuration is damaged."
        )


def _is_patterns(value) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) and item for item in value)


def _is_token_ids(value) -> bool:
    return isinstance(value, list) and all(is_int_from(0, i) for i in value)
