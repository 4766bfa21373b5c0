"""Configuration of CLIP prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft import PeftConfig, PromptTuningInit
from torch import nn

from ..presets import preset_settings
from .checks import as_member, check_config, check_resolved
from .towers import num_tower_layers


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
