"""What turns a dual encoder into a classifier of images by the embeddings of its class prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from .adapter_files import check_adapter_to_load, check_folder
from .class_prompts import check_class_names, check_template
from .class_texts import ClassTextsMixin
from .dual_encoder import token_table_name
from .loss import PromptClassifierOutput, active_regularizers, check_training, compute_loss
from .losses import Prediction, Regularizer
from .problem_type import check_labels
from .share_modules import share_modules
from .teacher import ZeroShotTeacher


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
