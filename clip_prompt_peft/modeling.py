"""The mixin that turns a dual encoder into a classifier of images by the embeddings of its class prompts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Self

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import can_return_tuple

from .calibrated import CalibratedClassifierMixin
from .heads import ClassHead, ImageHead
from .labels import LabelCheck
from .loss import PromptClassifierOutput, check_regularizers, compute_loss
from .regularizers import Prediction, Regularizer, regularizer_of
from .regularizers.teacher import ZeroShotTeacher
from .templates import (
    DEFAULT_TEMPLATE,
    check_class_names,
    check_template,
    name_labels,
    warn_of_names_without_words,
)
from .text import ClassEncoder, normalize
from .text.cache import Memo
from .text.prompts import ClassPrompts, build_class_prompts
from .text.tokenization import IGNORED, EncodedTexts, encode_texts
from .towers import embed_width, execution_device, num_positions, text_embeddings_of, token_table_name
from .tuner import CLIPPromptTuningConfig
from .tuner.hub import HubSettings, load_tokenizer
from .tuner.layout import PromptLayout


class PromptClassificationMixin(CalibratedClassifierMixin):
    """
    Class names for a dual encoder: images are scored against the embeddings of one prompt for each class.

    List it before the model of a family, as in `class CLIPForPromptClassification(PromptClassificationMixin,
    CLIPModel)`. The subclass sets the attributes that differ. Without an adapter, the result is the zero-shot
    classifier. With a prompt adapter, the prompts are written as the active adapter needs them. Other adapters (LoRA,
    ...) change the towers. Module paths are those of the family's model, so that checkpoints and adapters fit both.

    Create it with `from_pretrained`, or from a model in memory with `from_base`.

    **Attributes**, beside those of [`~pretrained.PretrainedClassifierMixin`]:
        - **padding** (`str`): How the text tower treats padding, see [`~tokenization.encode_texts`].
        - **default_template** (`str`): The template of zero-shot prompts.
        - **class_encoder** (`ClassEncoder`): Encodes the class prompts. It has settings of speed and memory.
        - **image_head**, **class_head** (`ImageHead`, `ClassHead`): Where adapters change image and class embeddings
          behind the towers.
        - **regularizers** (`dict[str, Regularizer]`): Further loss terms by name, added in training to that of the
          active adapter.
    """

    padding = IGNORED
    default_template = DEFAULT_TEMPLATE

    main_input_name = "pixel_values"
    # The loss is a mean over the batch. Without this, the Trainer would assume from **kwargs that the model divides by
    # num_items_in_batch, and would not divide by the number of accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # The Trainer takes every other output for predictions.
        self.config.keys_to_ignore_at_inference = ["hidden_states", "attentions"]
        self.config.class_names = getattr(config, "class_names", None)
        self.config.prompt_template = getattr(config, "prompt_template", None) or self.default_template
        self.tokenizer = None
        self.hub_settings = HubSettings()
        self.image_head, self.class_head = ImageHead(), ClassHead()
        self.class_encoder = ClassEncoder()
        self.regularizers: dict[str, Regularizer] = {}
        self.teacher = ZeroShotTeacher()
        self.label_check = LabelCheck()
        self._prompts = Memo()
        self._adapter_regularizers = Memo()
        self._fixed_class_embeds: torch.Tensor | None = None

    # peft's auto classes need these two if a tokenizer is saved beside the adapter.

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.text_embeddings, token_table_name(self.text_embeddings))

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.text_embeddings, token_table_name(self.text_embeddings), value)

    # Classes and prompts

    @property
    def text_embeddings(self) -> nn.Module:
        """The module that embeds tokens, where prompt adapters act."""
        return text_embeddings_of(self.text_model)

    @property
    def embed_width(self) -> int:
        """E, the width of image embeddings, and of class embeddings unless an adapter has those of a teacher."""
        return embed_width(self.config)

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of the prompt adapter in effect; `None` without one."""
        return getattr(self.text_embeddings, "prompt_layout", None)

    @property
    def class_names(self) -> list[str] | None:
        """The classes in use: those of the active adapter if it brings any, otherwise those of the classifier."""
        return self._class_names(self.prompt_layout)

    def _class_names(self, layout: PromptLayout | None) -> list[str] | None:
        return (layout and layout.class_names) or self.class_head.class_names or self.config.class_names

    @property
    def prompt_template(self) -> str:
        """The template of the zero-shot prompts. An active prompt adapter has its own."""
        return self.config.prompt_template

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Changes the classes, also those of the active prompt adapter.

        Raises:
            ValueError: If the names are not valid, a prompt is too long, or the active adapter has class embeddings of
                a teacher and none for a name. Nothing is changed then.
        """
        class_names = check_class_names(class_names)
        self.class_head.check_class_names(class_names)
        layout = self.prompt_layout
        self.build_prompts(class_names, self.prompt_template, layout)
        warn_of_names_without_words(class_names)
        self._fixed_class_embeds = None
        self._forget_temperatures(class_names)
        self.config.class_names, self.names_were_given = class_names, True
        if layout is not None:
            self.text_embeddings.check_tokenizer(self._get_tokenizer())  # before the token ids of the new names count
            self.text_embeddings.set_class_names(class_names, self._get_tokenizer())
        self.class_head.set_class_names(class_names)
        name_labels(self.config, class_names)
        self._class_prompts(self.prompt_layout)

    def set_prompt_template(self, prompt_template: str) -> None:
        """Changes the zero-shot template. Raises `ValueError` unless it holds `{}` exactly once."""
        check_template(prompt_template)
        self.config.prompt_template = prompt_template

    def adopt_prompt_layout(self, layout: PromptLayout, calibrated: CLIPPromptTuningConfig | None = None) -> None:
        """Takes over template, classes and calibration of an adapter that is merged into the model for good."""
        self._adopt_calibration(None)
        self.set_prompt_template(layout.padded_template)
        if layout.class_names is not None:
            self.set_class_names(layout.class_names)
        self._adopt_calibration(calibrated)

    def set_class_embeds(self, class_embeds: torch.Tensor | None) -> None:
        """Sets class embeddings that were made elsewhere, such as those of an ensemble of templates.

        They are used until `set_class_names` is called, are not saved, and are not used while a prompt adapter or a
        class head is active, since it has its own.

        Args:
            class_embeds (`torch.Tensor`, *optional*):
                (C, E), normalized or not. `None` returns to the prompts.

        Raises:
            ValueError: If the shape is another one.
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
        with torch.inference_mode(False):  # inference tensors could not be used in a later training
            self._fixed_class_embeds = normalize(class_embeds.detach()).to(execution_device(self))

    def set_teacher_class_embeds(self, class_embeds: torch.Tensor, class_names: Sequence[str] | None = None) -> None:
        """Sets class embeddings of a teacher, which the active adapter compares with and which are saved with it.

        [`DistillationTrainer`] does it for the classes of the training. For others, call `set_class_names` afterwards.

        Args:
            class_embeds (`torch.Tensor`):
                (K, projection_dim), normalized or not, such as `teacher.get_class_embeds()`.
            class_names (`Sequence[str]`, *optional*):
                Their K classes. Those that the adapter has embeddings for get new ones, and others are added. By
                default the classes in use.

        Raises:
            ValueError: If the active adapter has no `projection_dim`, or the shape is another one.

        Example:

        ```py
        >>> teacher.set_class_names(["cat", "dog", "fox"])
        >>> model.set_teacher_class_embeds(teacher.get_class_embeds(), teacher.class_names)
        >>> model.set_class_names(["dog", "fox"])
        ```
        """
        self.class_head.set_teacher_class_embeds(class_embeds, check_class_names(class_names or self.class_names))

    @property
    def has_fixed_class_embeds(self) -> bool:
        """Whether `set_class_embeds` has set class embeddings, which are used while no prompt adapter is active."""
        return self._fixed_class_embeds is not None

    def get_class_embeds(self, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Returns L2-normalized class embeddings, differentiable with respect to the active adapter.

        Args:
            image_embeds (`torch.Tensor`, *optional*):
                (B, E), needed if the active adapter is conditioned on the image, and otherwise not used.

        Returns:
            `torch.Tensor`: (C, E), or (B, C, E) if they depend on the image.
        """
        embeds = self._class_embeds(self.prompt_layout, image_embeds)
        return embeds if embeds.requires_grad else embeds.clone()  # the encoder may keep its own for the next call

    def _class_embeds(self, layout: PromptLayout | None, image_embeds: torch.Tensor | None) -> torch.Tensor:
        if layout is not None and self.class_head.configs_in_effect:
            raise ValueError(
                "Prompts and a class head are active together, and both would answer for the classes; activate one of "
                "the adapters with set_adapter."
            )
        return self.class_head.class_embeds(self._class_names(layout), lambda: self._encode(layout, image_embeds))

    def _encode(self, layout: PromptLayout | None, image_embeds: torch.Tensor | None) -> torch.Tensor:
        """Returns the class embeddings of the prompts."""
        if layout is None and self._fixed_class_embeds is not None:
            return self._fixed_class_embeds.to(execution_device(self))
        if torch.compiler.is_exporting():
            self._prepare_to_export()
        if layout is None or not layout.image_conditioned:
            prompts = self._class_prompts(layout)
            return self.class_encoder(self, prompts, layout, class_priors=self._class_priors(layout))
        if image_embeds is None:
            raise ValueError(
                "The active adapter makes its class embeddings for each image; pass image_embeds, (B, "
                f"{self.embed_width})."
            )
        return self.class_encoder(self, self._class_prompts(layout), layout, normalize(image_embeds))

    def _class_priors(self, layout: PromptLayout | None) -> torch.Tensor | None:
        """Returns the zero-shot class embeddings (C, E) that an adapter with a `class_aware_layer` starts from."""
        if layout is None or layout.class_prior_templates is None:
            return None
        return self.teacher.class_embeds(self, layout.class_prior_templates)

    @torch.compiler.assume_constant_result
    def _prepare_to_export(self) -> bool:
        # torch.export would record how the prompts are made, which depends on their values. Modes belong to a thread,
        # and this is the public way out of them.
        with ThreadPoolExecutor(1) as outside:
            outside.submit(self._prepare_inputs).result()
        return True

    def _prepare_inputs(self) -> None:
        layout = self.prompt_layout
        self.class_encoder.prepare(self, self._class_prompts(layout), layout)
        if layout is not None and layout.class_prior_templates is not None:
            self.teacher.prepare_to_export(self, layout.class_prior_templates)

    @property
    def class_prompts(self) -> ClassPrompts:
        """The tokenized prompts of the classes in use."""
        return self._class_prompts(self.prompt_layout)

    def _class_prompts(self, layout: PromptLayout | None) -> ClassPrompts:
        """Returns the prompts for a layout, which are built again if names, template or adapter have changed."""
        class_names = self._class_names(layout)
        if class_names is None:
            raise ValueError("The classifier has no class names; call set_class_names([...]) or load it with some.")

        def build() -> ClassPrompts:
            prompts = self.build_prompts(class_names, self.prompt_template, layout)
            name_labels(self.config, class_names)
            if layout is not None:
                self.text_embeddings.check_tokenizer(self._get_tokenizer())
            return prompts

        return self._prompts.get((tuple(class_names), self.prompt_template, layout), build)

    def build_prompts(
        self, class_names: Sequence[str], template: str, layout: PromptLayout | None = None
    ) -> ClassPrompts:
        """Calls [`build_class_prompts`] for this model."""
        max_length = num_positions(self.text_embeddings)
        return build_class_prompts(class_names, template, self._get_tokenizer(), max_length, layout, self.padding)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Tokenizes texts as the text tower expects them."""
        return encode_texts(texts, self._get_tokenizer(), num_positions(self.text_embeddings), self.padding)

    def _get_tokenizer(self):
        if self.tokenizer is None:
            if not self.name_or_path:
                raise ValueError(
                    "The classifier needs a tokenizer to read its class names, and this model has no name_or_path to "
                    "load one from; pass tokenizer=... to from_pretrained or from_base, or set model.tokenizer."
                )
            remedy = "Pass tokenizer=..., or the arguments (token, revision, ...) with which the model was loaded."
            self.tokenizer = load_tokenizer(self.name_or_path, self.hub_settings, remedy)
        return self.tokenizer

    # Classifying

    @property
    def active_regularizers(self) -> dict[str, Regularizer]:
        """The loss terms in effect, by name: those in `regularizers`, and that of the active prompt adapter."""
        return dict(self._active_regularizers(self.prompt_layout))

    def _active_regularizers(self, layout: PromptLayout | None) -> dict[str, Regularizer]:
        if layout is None or layout.regularizer is None:
            return self.regularizers
        return {
            **self.regularizers,
            layout.regularizer: self._adapter_regularizers.get((layout,), lambda: regularizer_of(layout)),
        }

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
            pixel_values (`torch.Tensor`, *optional*):
                (B, 3, H, W), as the processor returns them.
            labels (`torch.LongTensor`, *optional*):
                (B,) class indices. With them the mean cross entropy is returned as `loss`, in training plus the active
                regularizers. With `config.problem_type = "multi_label_classification"` they are (B, C) zeros and ones.
                With `config.classification_loss = "sigmoid"` the loss is that of SigLIP, see
                [`~loss.classification_loss`].
            image_embeds (`torch.Tensor`, *optional*):
                (B, E) instead of `pixel_values`: projected image features, normalized or not.
            input_ids (`torch.LongTensor`, *optional*):
                With them, the family's own `forward` is called and its output returned.
            attention_mask, position_ids, return_loss:
                The arguments of the family's own `forward`, only with `input_ids`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                As in the family's own `forward`.
            return_loss_terms (`bool`, *optional*, defaults to `False`):
                Whether to return cross entropy and regularizers separately, too.

        Returns:
            `PromptClassifierOutput`: `logits` (B, C) = `exp(logit_scale) * image_embeds @ class_embeds.T`, in
            evaluation divided by the `temperature` if there is one, and the loss.

        Raises:
            TypeError: If images or labels are no tensors.
            ValueError: If both or neither of `pixel_values` and `image_embeds` are given, there are no class names, or
                labels are not class indices. In training, also if a regularizer gets no labels, or vision prompts get
                `image_embeds`.
        """
        image_inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if input_ids is None:
            return self._classify(image_inputs, labels, image_embeds, return_loss_terms, **kwargs)
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._compare(labels, image_embeds, return_loss=return_loss, **text_inputs, **image_inputs, **kwargs)

    def _classify(self, image_inputs, labels, image_embeds, return_loss_terms, **kwargs) -> PromptClassifierOutput:
        """Computes `forward` without texts; `image_inputs` are the arguments of `get_image_features`."""
        layout = self.prompt_layout
        regularizers = self._active_regularizers(layout) if self.training else {}
        self._check_inputs(layout, image_inputs["pixel_values"], image_embeds)
        labels = self._checked_labels(layout, labels)
        names = [*regularizers, *(["pull"] if self.training and self.class_head.adds_to_loss else [])]
        check_regularizers(regularizers, names, labels, return_loss_terms, layout)
        vision = None
        if image_embeds is None:
            vision = self.get_image_features(**image_inputs, **kwargs)
            image_embeds = vision.pooler_output  # (B, E)
        if image_embeds.ndim != 2 or image_embeds.shape[1] != self.embed_width:
            raise ValueError(
                f"image_embeds must be (B, {self.embed_width}), the projected image features of this model, got "
                f"{tuple(image_embeds.shape)}."
            )
        prediction = self.predict(self.image_head(image_embeds), self._class_embeds(layout, image_embeds))
        logits = self.class_head(prediction.image_embeds, prediction.logits, self._class_names(layout))
        if not self.training and (temperature := self.temperature) is not None:
            logits = logits / temperature
        prediction = replace(prediction, logits=logits)
        loss = loss_terms = None
        if labels is not None:
            template = (layout and layout.prompt_template) or self.prompt_template
            loss, loss_terms = compute_loss(self, prediction, labels, image_inputs, regularizers, template)
        return PromptClassifierOutput(
            loss=loss,
            logits=prediction.logits,
            hidden_states=getattr(vision, "hidden_states", None),
            attentions=getattr(vision, "attentions", None),
            loss_terms=loss_terms if return_loss_terms else None,
        )

    def _check_inputs(self, layout, pixel_values, image_embeds) -> None:
        if (pixel_values is None) == (image_embeds is None):
            neither = (
                f"got neither (nor input_ids, as {self.base_class.__name__} takes). A data set of images becomes one "
                "of these by cache_image_embeds or with_pixel_values of clip_prompt_peft.data."
            )
            raise ValueError(
                "Give either pixel_values or image_embeds, " + (neither if pixel_values is None else "not both.")
            )
        name, images = ("pixel_values", pixel_values) if image_embeds is None else ("image_embeds", image_embeds)
        if not isinstance(images, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor, got a {type(images).__name__}; make it of PIL images with "
                "image_processor(images, return_tensors='pt')."
            )
        if pixel_values is not None and pixel_values.ndim == 2 and not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values look like token ids: {pixel_values.dtype} of shape {tuple(pixel_values.shape)}. The "
                f"first arguments are pixel_values and labels here, not input_ids as in {self.base_class.__name__}; "
                "name them: model(input_ids=..., pixel_values=...)."
            )
        if self.training and image_embeds is not None and layout is not None and layout.num_vision_virtual_tokens:
            raise ValueError(
                "The active adapter has vision prompts, so image embeddings made in advance would leave these "
                "untrained; train with pixel_values."
            )

    def _checked_labels(self, layout, labels):
        if torch.compiler.is_compiling():
            return labels
        self.label_check.read()
        if labels is None:
            return None
        self._class_prompts(layout)  # raises if there are no class names
        is_training = self.training and torch.is_grad_enabled()
        return self.label_check(labels, self._class_names(layout), self.config.problem_type, is_training)

    def train(self, mode: bool = True) -> Self:
        self.label_check.read()
        return super().train(mode)

    def state_dict(self, *args, **kwargs):
        self.label_check.read()
        return super().state_dict(*args, **kwargs)

    def _compare(self, labels, image_embeds, **inputs):
        """Calls the family's own `forward` of images and texts."""
        if labels is not None or image_embeds is not None:
            raise ValueError(
                f"With input_ids this is {self.base_class.__name__}.forward, which takes no labels and no "
                "image_embeds; leave input_ids out to classify."
            )
        return super().forward(**inputs)

    @property
    def log_scale(self) -> torch.Tensor:
        """The logarithm of the factor by which similarities are multiplied, as the family takes it."""
        return self.logit_scale

    def predict(self, image_embeds: torch.Tensor, class_embeds: torch.Tensor) -> Prediction:
        """Computes the logits for image embeddings (B, E) and normalized class embeddings (C, E) or (B, C, E).

        They are those of training, without a temperature.
        """
        return Prediction.of(image_embeds, class_embeds, self.log_scale, getattr(self, "logit_bias", None))


def classifier_in(model, what: str) -> PromptClassificationMixin:
    """Returns the classifier inside of a `PeftModel`, or the model itself if it is one.

    Raises:
        TypeError: If it is no classifier. The message says that `what` needs one.
    """
    classifier = model
    while isinstance(classifier, PeftModel):
        classifier = classifier.get_base_model()
    if not isinstance(classifier, PromptClassificationMixin):
        raise TypeError(
            f"{what} needs a classifier such as CLIPForPromptClassification, or a PeftModel around one, got a "
            f"{type(classifier).__name__}; build one with AutoModelForPromptClassification.from_base."
        )
    return classifier
