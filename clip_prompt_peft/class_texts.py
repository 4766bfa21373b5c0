"""What a classifier knows of its classes: names, template, prompts, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoTokenizer

from .class_encoder import ClassEncoder, normalize
from .class_prompts import (
    DEFAULT_TEMPLATE,
    ClassPrompts,
    PromptLayout,
    build_class_prompts,
    check_class_names,
    check_template,
)
from .dual_encoder import embed_width, num_positions, text_embeddings_of
from .tokenization import IGNORED, EncodedTexts, encode_texts


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
