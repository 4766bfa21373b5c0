"""Configuration of CLIP prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft import PeftConfig, PromptTuningInit

from ..class_prompts import check_class_names, check_template


class CLIPPromptPeftType(str, enum.Enum):
    """Our entry beside `peft.PeftType`, which is a closed enum.

    A member of a `str` enum and not a bare string: transformers asks `peft_type.value` of it when it loads an adapter.
    """

    CLIP_PROMPT_TUNING = "CLIP_PROMPT_TUNING"


class CLIPPromptTaskType(str, enum.Enum):
    """Our entry beside `peft.TaskType`: it selects [`PeftModelForPromptClassification`], which writes a model card."""

    PROMPT_CLASSIFICATION = "PROMPT_CLASSIFICATION"


@dataclass
class CLIPPromptTuningConfig(PeftConfig):
    """
    Configuration of [`CLIPPromptTuningModel`]: learnable vectors in place of token embeddings of a frozen CLIP.

    The vectors stand at positions `start_idx ... start_idx + num_virtual_tokens - 1` of every text; position
    embeddings, and all other tokens, stay as they are.

    Args:
        num_virtual_tokens (`int`, *optional*):
            Number of learnable vectors n. By default as many as the init text has tokens, which are all the words of
            the template in front of the class name. Fewer replace the first words only; more make room with
            placeholder words ("X X a photo of a {}."), see [`pad_template`].
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
        start_idx (`int`, defaults to 1):
            First replaced position; 0 is the begin token.
        class_names (`list[str]`, *optional*):
            Filled in from the classifier, so that the adapter alone makes a classifier.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the text embedding modules. By default every CLIP text embedding of the model.
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
    start_idx: int = field(default=1, metadata={"help": "First replaced position; 0 is the begin token."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Class names, filled in from the classifier."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Text embedding modules to wrap; by default every one of the model."}
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
        self.task_type = _as_member(CLIPPromptTaskType, task_type or "PROMPT_CLASSIFICATION", "task_type")
        self.peft_type = CLIPPromptPeftType.CLIP_PROMPT_TUNING
        self.prompt_tuning_init = _as_member(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        self._check_numbers()
        self._check_texts()
        # Ids that came through the constructor came from a file: they are final, no tokenizer is asked again, and
        # weights are expected to follow.
        self._loaded = self.replaced_token_ids is not None
        self._filled_in: dict[str, object] = {}
        if self._loaded:
            self._check_resolved()

    def forget_filled_in(self) -> None:
        """Takes back what an injection filled in: it belongs to that model, and this one may go into another."""
        for name, value in self._filled_in.items():
            if getattr(self, name) == value:  # otherwise the user has set it since
                setattr(self, name, None)
        self._filled_in = {}

    def _check_numbers(self):
        if self.num_virtual_tokens is not None and not _is_int_from(1, self.num_virtual_tokens):
            raise ValueError(f"num_virtual_tokens must be a positive integer, got {self.num_virtual_tokens!r}.")
        if not _is_int_from(1, self.start_idx):
            raise ValueError(
                f"start_idx must be an integer of at least 1 (position 0 is the begin token), got {self.start_idx!r}."
            )

    def _check_texts(self):
        if self.prompt_template is not None:
            check_template(self.prompt_template)
        if self.class_names is not None:
            self.class_names = check_class_names(self.class_names)
        if self.prompt_tuning_init_text is None:
            return
        if self.prompt_tuning_init is not PromptTuningInit.TEXT:
            raise ValueError(
                f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} is only used with "
                f"prompt_tuning_init='TEXT', got {self.prompt_tuning_init.value!r}."
            )
        if not isinstance(self.prompt_tuning_init_text, str) or not self.prompt_tuning_init_text.strip():
            raise ValueError(f"prompt_tuning_init_text must hold words, got {self.prompt_tuning_init_text!r}.")

    def _check_resolved(self):
        ids = self.replaced_token_ids
        if (
            not isinstance(ids, list)
            or not all(_is_int_from(0, i) for i in ids)
            or len(ids) != self.num_virtual_tokens
        ):
            raise ValueError(
                f"replaced_token_ids must be {self.num_virtual_tokens} token ids, one for each virtual token, got "
                f"{ids!r}; the adapter's configuration is damaged."
            )
        check_template(self.padded_template)


def _is_int_from(least: int, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _as_member(enum_class, value, field_name: str):
    try:
        return enum_class(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in enum_class)
        raise ValueError(f"{field_name} must be one of {allowed}, got {value!r}.") from None
