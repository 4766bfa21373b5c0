"""Configuration of CLIP prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from peft import PeftConfig, PromptTuningInit
from torch import nn

from ..towers import num_tower_layers
from .base_config import (
    FORMAT_VERSION,
    ClassifierAdapterConfig,
    CLIPPromptPeftType,
    as_member,
    option,
)
from .config_checks import check_config, check_resolved
from .presets import preset_settings


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
        temperature (`float`, *optional*):
            The number by which the classifier divides the logits of this adapter in evaluation, see
            [`~evaluation.calibration.fit_temperature`], which sets it. By default they stay as they are. The
            classifier reads it here, and `conformal_scores`, too.
        conformal_scores (`dict`, *optional*):
            What [`~evaluation.conformal.ConformalClassifier`] needs for sets of classes with a coverage. Set by its
            `fit`.
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
    temperature: float | None = option(None, "Number by which logits are divided in evaluation; by default none.")
    conformal_scores: dict | None = option(None, "Set by ConformalClassifier.fit: scores of validation images.")
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
        check_config(self)
        self.checked_tokenizer: int | None = None  # the id() of the tokenizer that `tokenizer_fingerprint` fits
        self.set_at_injection: dict[str, object] = {}  # field to value, of a configuration that `resolve` has made
        if self.has_weights:
            check_resolved(self)

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
