"""From one class of model to another without copying a weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import can_return_tuple

from .loss import PromptClassifierOutput, active_regularizers, check_labels, check_training, compute_loss
from .regularizers import Prediction, Regularizer
from .regularizers.teacher import ZeroShotTeacher
from .templates import DEFAULT_TEMPLATE, check_class_names, check_template
from .text import ClassEncoder, normalize
from .text.prompts import ClassPrompts, build_class_prompts
from .text.tokenization import IGNORED, EncodedTexts, encode_texts
from .towers import embed_width, num_positions, text_embeddings_of, token_table_name
from .tuner.files import check_adapter_to_load, check_folder
from .tuner.layout import PromptLayout


def share_modules(source: PreTrainedModel, target_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of `target_class` that holds the very modules of `source`."""
    with torch.device("meta"):  # these weights are thrown away at once
        model = target_class(copy.copy(source.config))
    for name, module in source.named_children():
        setattr(model, name, module)
    for name, parameter in source.named_parameters(recurse=False):  # logit scale, and bias where there is one
        setattr(model, name, parameter)
    for name in ("peft_config", "_hf_peft_config_loaded"):  # an adapter comes along with the modules
        if hasattr(source, name):
            setattr(model, name, getattr(source, name))
    return model.train(source.training)


class ClassTextsMixin:
    """
    The text side of [`PromptClassificationMixin`].

    **Attributes**:
        - **padding** (`str`): what the text tower makes of padding, see [`~tokenization.encode_texts`].
        - **default_template** (`str`): of the zero-shot prompts.
        - **class_encoder** (`ClassEncoder`): turns prompts into class embeddings; has settings of speed and memory.
    """

    padding = IGNORED
    default_template = DEFAULT_TEMPLATE

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.tokenizer = None
        self.class_encoder = ClassEncoder()
        self._prompts: ClassPrompts | None = None
        self._prompts_key: tuple | None = None
        self._fixed_class_embeds: torch.Tensor | None = None

    @property
    def text_embeddings(self) -> nn.Module:
        """The module that embeds tokens, where prompt adapters act."""
        return text_embeddings_of(self.text_model)

    @property
    def embed_width(self) -> int:
        """E, the width of image and class embeddings."""
        return embed_width(self.config)

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """How the active prompt adapter wants the prompts written; `None` without one."""
        return getattr(self.text_embeddings, "prompt_layout", None)

    @property
    def class_names(self) -> list[str] | None:
        """The classes in use: those of the active prompt adapter if it has any, otherwise the classifier's own."""
        return getattr(self.prompt_layout, "class_names", None) or self.config.class_names

    @property
    def prompt_template(self) -> str:
        """The template of the zero-shot prompts. An active prompt adapter brings its own."""
        return self.config.prompt_template

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Exchanges the classes, those of the active prompt adapter included.

        Raises:
            ValueError: empty, repeated or non-string names, or a prompt that is too long; nothing is changed then.
        """
        class_names = check_class_names(class_names)
        layout = self.prompt_layout
        self.build_prompts(class_names, self.prompt_template, layout)
        self._fixed_class_embeds = None
        self.config.class_names = class_names
        if layout is not None:
            layout.class_names = class_names
        self._class_prompts()

    def set_prompt_template(self, prompt_template: str) -> None:
        """Exchanges the zero-shot template. Raises `ValueError` unless it holds `{}` exactly once."""
        check_template(prompt_template)
        self.config.prompt_template = prompt_template

    def adopt_prompt_layout(self, layout: PromptLayout) -> None:
        """Makes the texts of an adapter the classifier's own; called when the adapter is merged into it for good."""
        self.set_prompt_template(layout.padded_template)
        if layout.class_names is not None:
            self.set_class_names(layout.class_names)

    def set_class_embeds(self, class_embeds: torch.Tensor | None) -> None:
        """Gives the classes embeddings made elsewhere, such as an ensemble of templates, in place of the prompts.

        They stay as they are until `set_class_names`, are not saved, and are not used while a prompt adapter is
        active: it brings its own prompts.

        Args:
            class_embeds: (C, E), normalised or not; `None` goes back to the prompts.

        Raises:
            ValueError: another shape than that.
        """
        if class_embeds is None:
            self._fixed_class_embeds = None
            return
        shape = (len(self.config.class_names or ()), self.embed_width)
        if tuple(class_embeds.shape) != shape:
            raise ValueError(
                f"class_embeds must be {shape}, one embedding for each of the classifier's classes, got "
                f"{tuple(class_embeds.shape)}."
            )
        self._fixed_class_embeds = normalize(class_embeds.detach()).to(self.device)

    def get_class_embeds(self, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """L2-normalised class embeddings, differentiable with respect to the active adapter.

        Args:
            image_embeds: (B, E), needed if the active adapter is conditioned on the image; otherwise not used.

        Returns:
            (C, E), or (B, C, E) if they depend on the image.
        """
        embeds = self._class_embeds(image_embeds)
        return embeds if embeds.requires_grad else embeds.clone()  # the encoder may keep its own for the next call

    def _class_embeds(self, image_embeds: torch.Tensor | None) -> torch.Tensor:
        layout = self.prompt_layout
        if layout is None and self._fixed_class_embeds is not None:
            return self._fixed_class_embeds.to(self.device)
        if layout is None or not layout.image_conditioned:
            return self.class_encoder(self, self._class_prompts(), layout)
        if image_embeds is None:
            raise ValueError(
                "The active adapter makes its class embeddings for each image; pass image_embeds, (B, "
                f"{self.embed_width})."
            )
        return self.class_encoder(self, self._class_prompts(), layout, normalize(image_embeds))

    def _class_prompts(self) -> ClassPrompts:
        """The tokenized prompts of the classes in use, built anew when names, template or adapter have changed."""
        class_names, layout = self.class_names, self.prompt_layout
        if class_names is None:
            raise ValueError("The classifier has no class names; call set_class_names([...]) or load it with some.")
        key = (tuple(class_names), self.prompt_template, _layout_key(layout))
        if key != self._prompts_key:
            self._prompts = self.build_prompts(class_names, self.prompt_template, layout)
            self._prompts_key = key
            self.config.id2label = dict(enumerate(class_names))
            self.config.label2id = {name: index for index, name in enumerate(class_names)}
        return self._prompts

    def build_prompts(
        self, class_names: Sequence[str], template: str, layout: PromptLayout | None = None
    ) -> ClassPrompts:
        """As [`build_class_prompts`], for this model."""
        max_length = num_positions(self.text_embeddings)
        return build_class_prompts(class_names, template, self._get_tokenizer(), max_length, layout, self.padding)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """The tokens of any texts, as the text tower takes them."""
        return encode_texts(texts, self._get_tokenizer(), num_positions(self.text_embeddings), self.padding)

    def _get_tokenizer(self):
        if self.tokenizer is None:
            if not self.name_or_path:
                raise ValueError(
                    "The classifier needs a tokenizer to read its class names, and this model has no name_or_path to "
                    "load one from; pass tokenizer=..."
                )
            self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, trust_remote_code=False)
        return self.tokenizer


def _layout_key(layout: PromptLayout | None) -> tuple | None:
    if layout is None:
        return None
    position = (layout.start_idx, layout.num_vectors_before_class, str(layout.class_token_count))
    return layout.padded_template, *position, tuple(layout.replaced_token_ids)


class PromptClassificationMixin(ClassTextsMixin):
    """
    Class names for a dual encoder: images are scored against the embeddings of one prompt per class.

    It stands in front of a family's model, `class CLIPForPromptClassification(PromptClassificationMixin, CLIPModel)`,
    and the class says what differs by attributes. Without an adapter the result is the zero-shot classifier. With a
    prompt adapter in it, the prompts are written as the active adapter wants them; other adapters (LoRA, ...) change
    the towers. The module paths are those of the family's model, so checkpoints and adapters fit both.

    Build it with `from_pretrained`, or around a model in memory with `from_base`.

    **Attributes**:
        - **base_class** (`type`): the family's model.
        - **weight_names** (`dict[str, str]`, *optional*): patterns of names in checkpoints, and what they are here.
          transformers renames weights of its own classes only.
        - **padding**, **default_template** (`str`): see [`ClassTextsMixin`].
        - **regularizers** (`dict[str, Regularizer]`): loss terms of your own by name, added in training beside that of
          the active adapter.
    """

    base_class: type[PreTrainedModel]
    weight_names: dict[str, str] | None = None

    main_input_name = "pixel_values"
    # The loss is a mean over the batch; without this the Trainer takes **kwargs for a promise to divide by
    # num_items_in_batch and would not divide by the number of accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # The Trainer takes every output that is not named here for predictions.
        self.config.keys_to_ignore_at_inference = ["hidden_states", "attentions"]
        self.regularizers: dict[str, Regularizer] = {}
        self.teacher = ZeroShotTeacher()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
        tokenizer=None,
        **kwargs,
    ):
        """
        As the family's own `from_pretrained`, with class names. A folder or Hub id of a prompt adapter works too.

        Args:
            pretrained_model_name_or_path: checkpoint of the family, saved classifier, or adapter.
            class_names: C names; by default those saved with the checkpoint or adapter.
            prompt_template: text with one `{}`, by default the saved one or the family's `default_template`.
            tokenizer: by default the one that lies beside the checkpoint.

        Raises:
            ValueError: bad names or template (before anything is loaded), or a checkpoint of something else.
        """
        if class_names is not None:
            class_names = check_class_names(class_names)
        if prompt_template is not None:
            check_template(prompt_template)
        check_folder(pretrained_model_name_or_path)  # of an adapter
        with_info = kwargs.pop("output_loading_info", False)
        if cls.weight_names is not None:
            kwargs.setdefault("key_mapping", cls.weight_names)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is not a {cls.family_name()} checkpoint: it lacks {len(missing)} "
                f"of the model's weights ({', '.join(missing[:3])}, ...). AutoModelForPromptClassification picks the "
                "class by the checkpoint's config."
            )
        model._set_up(class_names, prompt_template, tokenizer)
        return (model, info) if with_info else model

    @classmethod
    def from_base(
        cls,
        model: PreTrainedModel,
        tokenizer=None,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
    ) -> PromptClassificationMixin:
        """A classifier around a model of the family in memory. The modules are shared with it, not copied.

        Raises:
            TypeError: if it is not of the family.
            ValueError: bad names or template.
        """
        if not isinstance(model, cls.base_class):
            hint = "; of a PeftModel pass get_base_model()" if hasattr(model, "get_base_model") else ""
            raise TypeError(
                f"{cls.__name__} is made from a {cls.base_class.__name__}, got a {type(model).__name__}{hint}."
            )
        classifier = share_modules(model, cls)
        classifier._set_up(class_names, prompt_template, tokenizer)
        return classifier

    def to_base(self) -> PreTrainedModel:
        """The plain model of the family, sharing the modules of this classifier.

        Raises:
            ValueError: if an adapter is still in it.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"The adapters {sorted(self.peft_config)} are still in the model; call merge_and_unload() or unload() "
                "on the PeftModel first and then this method on what it returns."
            )
        return share_modules(self, self.base_class)

    @classmethod
    def family_name(cls) -> str:
        """Such as `"CLIP"`."""
        return cls.base_class.__name__.removesuffix("Model")

    def save_pretrained(self, save_directory, **kwargs):
        """As the family's own `save_pretrained`; the tokenizer is saved too, since the class prompts need it.

        With an adapter from `add_adapter` in it, that adapter alone is saved, as transformers does.
        """
        if self.class_names is not None:
            self._class_prompts()  # brings id2label up to date, should an adapter have been switched since
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True) and not self._hf_peft_config_loaded:
            self._get_tokenizer().save_pretrained(save_directory)

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """As transformers' `load_adapter`; a prompt adapter that would change the frozen model raises `ValueError`."""
        check_adapter_to_load(peft_model_id, **kwargs)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def _set_up(self, class_names, prompt_template, tokenizer) -> None:
        layout = self.prompt_layout  # of an adapter that was loaded with the checkpoint
        if prompt_template is None:
            saved = getattr(self.config, "prompt_template", None)
            prompt_template = saved or getattr(layout, "prompt_template", None) or self.default_template
        if class_names is None:
            class_names = getattr(self.config, "class_names", None) or getattr(layout, "class_names", None)
        if self.config.problem_type is None:
            self.config.problem_type = getattr(layout, "problem_type", None)
        self.tokenizer = tokenizer
        self.set_prompt_template(prompt_template)
        if class_names is None:
            self.config.class_names = None
        else:
            self.set_class_names(class_names)

    # Needed by peft's auto classes when a tokenizer lies beside the adapter.
    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.text_embeddings, token_table_name(self.text_embeddings))

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.text_embeddings, token_table_name(self.text_embeddings), value)

    @property
    def active_regularizers(self) -> dict[str, Regularizer]:
        """The loss terms in effect, by name: your own (`regularizers`) and that of the active prompt adapter."""
        return active_regularizers(self)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_embeds: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss_terms: bool = False,
        **kwargs,
    ) -> PromptClassifierOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), as the processor makes them.
            labels: (B,) class indices; with them the mean cross entropy is returned as `loss`, in training plus the
                active regularizers. With `config.problem_type = "multi_label_classification"` they are (B, C) zeros
                and ones, and it is the binary cross entropy of the logits. With `config.classification_loss =
                "sigmoid"` it is SigLIP's loss, see [`~problem_type.classification_loss`].
            image_embeds: (B, E) in place of `pixel_values`, projected image features, normalised or not.
            input_ids: if given, this is the family's own `forward` and returns its output.
            attention_mask, position_ids, return_loss: as in the family's own, only with `input_ids`.
            interpolate_pos_encoding: as in the family's own.
            return_loss_terms: return cross entropy and regularizers one by one, too.

        Returns:
            `PromptClassifierOutput` with `logits` (B, C) = `exp(logit_scale) * image_embeds @ class_embeds.T`.

        Raises:
            ValueError: both or neither of `pixel_values` and `image_embeds`; labels outside of 0 ... C - 1; no class
                names; in training, a regularizer without labels, or vision prompts with `image_embeds`.
        """
        image_inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if input_ids is None:
            return self._classify(image_inputs, labels, image_embeds, return_loss_terms, **kwargs)
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._compare(labels, image_embeds, return_loss=return_loss, **text_inputs, **image_inputs, **kwargs)

    def _classify(self, image_inputs, labels, image_embeds, return_loss_terms, **kwargs) -> PromptClassifierOutput:
        """`forward` without texts; `image_inputs` are what `get_image_features` takes."""
        pixel_values = image_inputs["pixel_values"]
        if (pixel_values is None) == (image_embeds is None):
            neither = f"got neither (nor input_ids, as {self.base_class.__name__} takes)."
            raise ValueError(
                "Give either pixel_values or image_embeds, " + (neither if pixel_values is None else "not both.")
            )
        self._check_labels(labels)
        if self.training:
            check_training(self, labels, image_embeds, return_loss_terms)
        vision = None
        if image_embeds is None:
            vision = self.get_image_features(**image_inputs, **kwargs)
            image_embeds = vision.pooler_output  # (B, E)
        self._check_width(image_embeds)
        prediction = self.predict(image_embeds, self._class_embeds(image_embeds))
        loss, loss_terms = (None, None) if labels is None else compute_loss(self, prediction, labels, image_inputs)
        return PromptClassifierOutput(
            loss=loss,
            logits=prediction.logits,
            hidden_states=getattr(vision, "hidden_states", None),
            attentions=getattr(vision, "attentions", None),
            loss_terms=loss_terms if return_loss_terms else None,
        )

    def _compare(self, labels, image_embeds, **inputs):
        """The family's own `forward`, of images and texts."""
        if labels is not None or image_embeds is not None:
            raise ValueError(
                f"With input_ids this is {self.base_class.__name__}.forward, which takes no labels and no "
                "image_embeds; leave input_ids out to classify."
            )
        return super().forward(**inputs)

    def predict(self, image_embeds: torch.Tensor, class_embeds: torch.Tensor) -> Prediction:
        """The logits that belong to embeddings of images (B, E) and, normalised, of classes (C, E) or (B, C, E)."""
        return Prediction.of(image_embeds, class_embeds, self.logit_scale, getattr(self, "logit_bias", None))

    def _check_labels(self, labels) -> None:
        if labels is None or torch.compiler.is_compiling():
            return
        self._class_prompts()  # complains if there are no class names
        check_labels(labels, self.class_names, self.config.problem_type)

    def _check_width(self, image_embeds) -> None:
        width = self.embed_width
        if image_embeds.ndim != 2 or image_embeds.shape[1] != width:
            raise ValueError(
                f"image_embeds must be (B, {width}), the projected image features of this model, got "
                f"{tuple(image_embeds.shape)}."
            )
