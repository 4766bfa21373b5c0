"""A CLIP that classifies images by the embeddings of its class prompts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import CLIPModel

from .prompt_classification import PromptClassificationMixin


class CLIPForPromptClassification(PromptClassificationMixin, CLIPModel):
    """
    `CLIPModel` with class names: images are scored against the embeddings of one prompt per class.

    Without an adapter it is the zero-shot classifier. With a prompt adapter in it, the prompts are written as the
    active adapter wants them; any other adapter (LoRA, ...) simply changes the towers. The module paths are those of
    `CLIPModel`, so checkpoints and adapters fit both. See [`PromptClassificationMixin`] for its methods.

    Build it with [`~CLIPForPromptClassification.from_pretrained`] or [`~CLIPForPromptClassification.from_clip`].

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
        tokenizer=None,
        class_names: Sequence[str] | None = None,
        prompt_template: str | None = None,
    ) -> CLIPForPromptClassification:
        """A classifier around a `CLIPModel` in memory; another name for `from_base`."""
        return cls.from_base(clip, tokenizer, class_names, prompt_template)

    def to_clip(self) -> CLIPModel:
        """The plain `CLIPModel`, sharing the modules of this classifier; another name for `to_base`."""
        return self.to_base()
