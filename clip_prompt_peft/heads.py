"""The two places of a classifier, behind its towers, where adapters can act: on image and on class embeddings.

Without an adapter, both leave everything as it is and hold no tensors. They are modules so that peft can wrap them. A
layer in place of a `ClassHead` can bring classes of its own, and terms of the loss.
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

    def baked(self, class_names: Sequence[str] | None) -> nn.Module:
        """Returns `forward` for fixed classes, as a module that takes image embeddings (B, E) and logits (B, C)."""
        return nn.Identity()

    @property
    def class_names(self) -> list[str] | None:
        """The classes in use, if the head has some of its own."""
        return None

    @property
    def adapter_config(self):
        """The configuration of the active adapter, with its class names, template and problem type; or `None`."""
        return None

    @property
    def configs_in_effect(self) -> list:
        """The configurations of the adapters that answer here, of which there is one at most."""
        return []

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Changes the classes in use, also of the active adapter."""

    def label_with(self, config) -> None:
        """Keeps the labels in the config of a classifier those of the classes in use, from now on."""

    @property
    def adds_to_loss(self) -> bool:
        """Whether `loss_terms` are not empty."""
        return False

    def loss_terms(self) -> dict[str, torch.Tensor]:
        """Returns what is added to the loss in training, by name."""
        return {}


class CachedImages(nn.Module):
    """
    Adds to the logits of an image what it has in common with the training images of each class (Tip-Adapter).

    Args:
        keys (`torch.Tensor`):
            (N, E) embeddings of the training images.
        values (`torch.Tensor`):
            (N, C) ones for the class of each training image, and zeros.
        alpha, beta (`float`):
            Weight and sharpness: `alpha * exp(-beta * (1 - image_embeds @ keys.T)) @ values` is added.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, alpha: float, beta: float) -> None:
        super().__init__()
        if isinstance(keys, nn.Parameter):
            self.__dict__["keys"] = keys  # trained where it belongs
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.alpha, self.beta = alpha, beta

    def forward(self, image_embeds: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            affinity = (-self.beta * (1 - image_embeds.to(self.keys.dtype) @ self.keys.T)).exp()  # (B, N)
            return logits + (self.alpha * affinity @ self.values).to(logits.dtype)
