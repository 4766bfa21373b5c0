"""The two places of a classifier, behind its towers, where adapters can act: on image and on class embeddings.

Without an adapter, both leave everything as it is and hold no tensors. They are modules so that peft can wrap them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class ImageHead(nn.Module):
    """What is done to projected image features before they are compared with the class embeddings: nothing."""

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Maps image features (B, E) to those (B, E') that are compared with class embeddings (C, E')."""
        return image_embeds


class ClassHead(nn.Module):
    """Where class embeddings come from, and what is added to the logits: from the prompts, and nothing."""

    def class_embeds(self, class_names: Sequence[str] | None, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns the normalized class embeddings (C, E), or (B, C, E) if they depend on the image.

        Args:
            class_names (`Sequence[str]`, *optional*):
                The C classes in use.
            encode (`Callable`):
                Encodes the prompts of these classes. It is called only if its result is needed.
        """
        return encode()

    def check_class_names(self, class_names: Sequence[str]) -> None:
        """Raises `ValueError` if there can be no embedding of one of these classes."""

    def set_teacher_class_embeds(self, class_embeds: torch.Tensor, class_names: Sequence[str]) -> None:
        """Sets the embeddings (C, E') of classes that an adapter compares with in place of those of the prompts.

        Raises:
            ValueError: If no such adapter is active.
        """
        raise ValueError(
            "No adapter with class embeddings of a teacher is active; make one with a projection_dim in its "
            "configuration, or activate it."
        )

    def forward(
        self, image_embeds: torch.Tensor, logits: torch.Tensor, class_names: Sequence[str] | None
    ) -> torch.Tensor:
        """Returns the logits (B, C), given normalized image embeddings (B, E) and the logits of the class embeddings.

        Args:
            image_embeds (`torch.Tensor`):
                (B, E), normalized, behind the image head.
            logits (`torch.Tensor`):
                (B, C).
            class_names (`Sequence[str]`, *optional*):
                The C classes in use.
        """
        return logits
