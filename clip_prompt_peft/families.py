"""The classifiers for CLIP and related dual encoders in transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    Aimv2Model,
    AltCLIPModel,
    ChineseCLIPModel,
    CLIPModel,
    GroupViTModel,
    MetaClip2Model,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Siglip2Model,
    SiglipModel,
)
from transformers.utils import can_return_tuple

from .loss import PromptClassifierOutput
from .modeling import PromptClassificationMixin
from .text.packing import ADDITIVE_ATTENTION, attention_of
from .text.tokenization import MASKED, READ


class CLIPForPromptClassification(PromptClassificationMixin, CLIPModel):
    """
    `CLIPModel` with class names, which scores images against the embeddings of one prompt for each class.

    See [`PromptClassificationMixin`] for its methods. Create it with [`~CLIPForPromptClassification.from_pretrained`],
    or from a model in memory with [`~CLIPForPromptClassification.from_clip`].

    Example:

    ```py
    >>> from clip_prompt_peft import CLIPForPromptClassification

    >>> model = CLIPForPromptClassification.from_pretrained(
    ...     "openai/clip-vit-base-patch32", class_names=["cat", "dog"], prompt_template="a photo of a {}."
    ... )
    >>> logits = model(pixel_values=pixel_values).logits  # (B, 2)
    ```
    """

    base_class = CLIPModel

    @classmethod
    def from_clip(
        cls,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
    ) -> CLIPForPromptClassification:
        """Creates a classifier from a `CLIPModel` in memory. Another name for `from_base`."""
        return cls.from_base(clip, tokenizer, class_names, prompt_template)

    def to_clip(self) -> CLIPModel:
        """Returns the plain `CLIPModel`, which shares its modules. Another name for `to_base`."""
        return self.to_base()


class MetaClip2ForPromptClassification(PromptClassificationMixin, MetaClip2Model):
    """[`PromptClassificationMixin`] on `MetaClip2Model`: CLIP with a multilingual tokenizer."""

    base_class = MetaClip2Model


class SiglipForPromptClassification(PromptClassificationMixin, SiglipModel):
    """
    [`PromptClassificationMixin`] on `SiglipModel`.

    Texts have no begin token. The text tower attends in both directions and pools the last of 64 positions, which can
    be padding. Logits have a bias. `config.classification_loss = "sigmoid"` trains with the loss of SigLIP instead of
    the cross entropy.
    """

    base_class = SiglipModel
    padding = READ


class Siglip2ForPromptClassification(PromptClassificationMixin, Siglip2Model):
    """
    [`PromptClassificationMixin`] on `Siglip2Model`, the NaFlex variant of SigLIP 2 (the others are `SiglipModel`s).

    It is like [`SiglipForPromptClassification`], but images are patches, in their own aspect ratio.
    """

    base_class = Siglip2Model
    padding = READ
    masks_vision_prompts = True

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
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        return_loss_terms: bool = False,
        **kwargs,
    ) -> PromptClassifierOutput:
        """Computes the same as the `forward` of the other classifiers.

        Args:
            pixel_values (`torch.Tensor`, *optional*):
                (B, patches, values of a patch), as the processor returns them.
            pixel_attention_mask (`torch.Tensor`, *optional*):
                (B, patches), 1 for patches that are not padding.
            spatial_shapes (`torch.LongTensor`, *optional*):
                (B, 2), the numbers of rows and columns of patches.
        """
        image_inputs = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        if input_ids is None:
            return self._classify(image_inputs, labels, image_embeds, return_loss_terms, **kwargs)
        image_inputs["pixel_attention_mask"] = self._with_vision_prompts(pixel_attention_mask)
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._compare(labels, image_embeds, return_loss=return_loss, **text_inputs, **image_inputs, **kwargs)

    def get_image_features(self, pixel_values=None, pixel_attention_mask=None, spatial_shapes=None, **kwargs):
        """Computes the same as `Siglip2Model.get_image_features`, with vision prompts in the mask."""
        if pixel_values is not None and (pixel_attention_mask is None or spatial_shapes is None):
            raise ValueError(
                "pixel_values of this model are patches, which need pixel_attention_mask and spatial_shapes; pass all "
                "outputs of the image processor."
            )
        mask = self._with_vision_prompts(pixel_attention_mask)
        return super().get_image_features(pixel_values, mask, spatial_shapes, **kwargs)

    def _with_vision_prompts(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Returns (B, patches + n), since vision prompts come after the patches."""
        layout = self.prompt_layout
        n = 0 if layout is None else layout.num_vision_virtual_tokens
        return torch.nn.functional.pad(mask, (0, n), value=1) if mask is not None and n else mask


class ChineseCLIPForPromptClassification(PromptClassificationMixin, ChineseCLIPModel):
    """[`PromptClassificationMixin`] on `ChineseCLIPModel`, whose text tower is a BERT."""

    base_class = ChineseCLIPModel
    padding = MASKED
    default_template = "一张{}的照片。"  # "a photo of a {}."


class AltCLIPForPromptClassification(PromptClassificationMixin, AltCLIPModel):
    """[`PromptClassificationMixin`] on `AltCLIPModel`, whose text tower is an XLM-R."""

    base_class = AltCLIPModel
    padding = MASKED
    weight_names = {r"encoder\.layer\.": "encoder.layers."}


class Aimv2ForPromptClassification(PromptClassificationMixin, Aimv2Model):
    """
    [`PromptClassificationMixin`] on `Aimv2Model`, the contrastive (LiT) variant of AIMv2.

    A token of a text attends to those before it, whatever else is in the batch. `Aimv2Model` itself builds no causal
    mask without an `attention_mask`, nor, with the attention `sdpa`, if no text of a batch has padding: then a text
    has another embedding than beside a longer one.
    """

    base_class = Aimv2Model

    @property
    def log_scale(self) -> torch.Tensor:
        return self.logit_scale.clamp(0.0, self.max_log_logit_scale)

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        """Computes the same as `Aimv2Model.get_text_features`, always with a causal mask.

        Raises:
            ValueError: If the attention implementation takes no mask of the model's own.
        """
        return super().get_text_features(input_ids, self._causal_mask(input_ids, attention_mask), **kwargs)

    def _compare(self, labels, image_embeds, *, input_ids, attention_mask=None, **inputs):
        mask = self._causal_mask(input_ids, attention_mask)
        return super()._compare(labels, image_embeds, input_ids=input_ids, attention_mask=mask, **inputs)

    def _causal_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns (B, 1, L, L): added to the scores by `eager`, and where to look for `sdpa`."""
        attention, length = attention_of(self.text_model)[0], input_ids.shape[1]
        if attention not in ADDITIVE_ATTENTION:
            raise ValueError(
                f"With attn_implementation={attention!r}, the text tower of Aimv2Model takes no causal mask; load the "
                "model with attn_implementation='sdpa' or 'eager'."
            )
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        visible = visible.expand(len(input_ids), 1, length, length)
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None]
        if attention == "sdpa":
            return visible
        dtype = self.text_projection.weight.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )


class GroupViTForPromptClassification(PromptClassificationMixin, GroupViTModel):
    """
    [`PromptClassificationMixin`] on `GroupViTModel`, whose image tower groups the patches in stages.

    Its projections hold batch norms, and its stages assign patches to groups with random noise in training. Both stay
    in eval mode: the frozen model would change with every batch, and a class embedding with the other classes.
    """

    base_class = GroupViTModel

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d) or hasattr(module, "assign_eps"):
                module.training = False
        return self

    def get_image_features(self, pixel_values, interpolate_pos_encoding=False, **kwargs):
        """Computes the same as `GroupViTModel.get_image_features`.

        Raises:
            ValueError: If images of another size are asked for.
        """
        if interpolate_pos_encoding:
            raise ValueError("The image tower of GroupViTModel takes images of one size, without interpolation.")
        return super().get_image_features(pixel_values, **kwargs)


CLASSIFIERS: tuple[type[PromptClassificationMixin], ...] = (
    CLIPForPromptClassification,
    MetaClip2ForPromptClassification,
    SiglipForPromptClassification,
    Siglip2ForPromptClassification,
    ChineseCLIPForPromptClassification,
    AltCLIPForPromptClassification,
    Aimv2ForPromptClassification,
    GroupViTForPromptClassification,
)


def classifier_class(config: PreTrainedConfig) -> type[PromptClassificationMixin]:
    """Returns the classifier class for a model config.

    Raises:
        ValueError: If the family is not supported. The message lists those that are.
    """
    for classifier in CLASSIFIERS:
        if type(config) is classifier.config_class:
            return classifier
    supported = ", ".join(f"{one.config_class.model_type} ({one.base_class.__name__})" for one in CLASSIFIERS)
    raise ValueError(
        f"{type(config).__name__} (model type {config.model_type!r}) is not of a supported family: {supported}."
    )
