"""The other families of dual encoders in transformers: each class says what differs from CLIP."""

from __future__ import annotations

import torch
from transformers import AltCLIPModel, ChineseCLIPModel, MetaClip2Model, Siglip2Model, SiglipModel
from transformers.utils import can_return_tuple

from .loss import PromptClassifierOutput
from .prompt_classification import PromptClassificationMixin
from .tokenization import MASKED, READ


class MetaClip2ForPromptClassification(PromptClassificationMixin, MetaClip2Model):
    """[`PromptClassificationMixin`] on `MetaClip2Model`: CLIP with a multilingual tokenizer."""

    base_class = MetaClip2Model


class SiglipForPromptClassification(PromptClassificationMixin, SiglipModel):
    """
    [`PromptClassificationMixin`] on `SiglipModel`.

    Texts have no begin token; the tower attends both ways and pools the last of 64 positions, padding or not. Logits
    have a bias. `config.classification_loss = "sigmoid"` trains with SigLIP's own loss in place of cross entropy.
    """

    base_class = SiglipModel
    padding = READ


class Siglip2ForPromptClassification(PromptClassificationMixin, Siglip2Model):
    """
    [`PromptClassificationMixin`] on `Siglip2Model`, the NaFlex variant of SigLIP 2 (the others are `SiglipModel`s).

    As [`SiglipForPromptClassification`]; images come as patches, in their own aspect ratio.
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
        """As the other classifiers' `forward`.

        Args:
            pixel_values: (B, patches, values of a patch), as the processor makes them.
            pixel_attention_mask: (B, patches), 1 where there is a patch.
            spatial_shapes: (B, 2), rows and columns of patches.
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
        """As `Siglip2Model.get_image_features`; vision prompts are seen, too."""
        if pixel_values is not None and (pixel_attention_mask is None or spatial_shapes is None):
            raise ValueError(
                "pixel_values of this model are patches, which need pixel_attention_mask and spatial_shapes beside "
                "them; pass on all that the image processor gives."
            )
        mask = self._with_vision_prompts(pixel_attention_mask)
        return super().get_image_features(pixel_values, mask, spatial_shapes, **kwargs)

    def _with_vision_prompts(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(B, patches + n): vision prompts stand behind the patches."""
        n = getattr(self.prompt_layout, "num_vision_virtual_tokens", 0)
        return torch.nn.functional.pad(mask, (0, n), value=1) if mask is not None and n else mask


class ChineseCLIPForPromptClassification(PromptClassificationMixin, ChineseCLIPModel):
    """[`PromptClassificationMixin`] on `ChineseCLIPModel`: the text tower is a BERT, which attends both ways."""

    base_class = ChineseCLIPModel
    padding = MASKED
    default_template = "一张{}的照片。"  # "a photo of a {}."


class AltCLIPForPromptClassification(PromptClassificationMixin, AltCLIPModel):
    """[`PromptClassificationMixin`] on `AltCLIPModel`: the text tower is an XLM-R, which attends both ways."""

    base_class = AltCLIPModel
    padding = MASKED
    weight_names = {r"encoder\.layer\.": "encoder.layers."}
