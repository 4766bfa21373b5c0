"""Learnable tokens behind the patches of the image."""

from __future__ import annotations

import torch
from torch import nn

from .coupling import CLIPVectorsLayer


class CLIPVisionLearnableEmbeddings(CLIPVectorsLayer):
    """
    Wraps `CLIPVisionEmbeddings` or those of another family: n vectors are appended to class token and patches.

    They come after the position embeddings have been added and get none of their own, and before the pre-LayerNorm,
    which CLIP applies to the result (MaPLe, IVLP and PromptSRC; VPT for other vision transformers puts them after the
    class token, which for tokens without position makes no difference).
    """

    # Where transformers looks for the input embeddings of an image tower, and for its positions.
    @property
    def patch_embedding(self) -> nn.Module:
        return self.get_base_layer().patch_embedding

    @property
    def class_embedding(self) -> nn.Parameter:
        return self.get_base_layer().class_embedding

    @property
    def position_embedding(self) -> nn.Module:
        return self.get_base_layer().position_embedding

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """
        Returns:
            (B, 1 + patches + n, D), or one less without a class token

        Raises:
            ValueError: if more than one active adapter has vision prompts.
        """
        embeddings = self.base_layer(*args, **kwargs)  # (B, 1 + patches, D)
        adapters = self._active_here()
        if self.disable_adapters or not adapters:
            return embeddings
        if len(adapters) > 1:
            raise ValueError(
                f"The active adapters {adapters} all have vision prompts, whose places in the sequence depend on each "
                "other; activate one of them only."
            )
        vectors = self.vectors(adapters[0]).to(embeddings)  # (n, D)
        return torch.cat([embeddings, vectors.expand(embeddings.shape[0], -1, -1)], dim=1)
