"""The tensors of each kind of head, and what they do with image embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..heads import CachedImages
from ..text.cache import Memo
from ..tuner.tensors import empty_vectors
from .config import CACHE, ClassHeadConfig


class LinearHead(nn.Module):
    """
    A row of weights for each class. Logits are `exp(logit_scale) * normalize(v) @ normalize(class_embeds).T`.

    **Attributes**:
        - **class_embeds** (`nn.Parameter`) -- (C, E), as trained, not normalized.
        - **start**, **pull_weights** (`torch.Tensor`, *optional*) -- (C, E) and (C,), with `pull`: the rows of the
          start, and how strongly each class is held there.
    """

    start: torch.Tensor
    pull_weights: torch.Tensor

    def __init__(self, config: ClassHeadConfig, like: torch.Tensor) -> None:
        super().__init__()
        shape = (len(config.class_names), config.embed_width)
        self.class_embeds = nn.Parameter(empty_vectors(shape, like))
        self.is_fitted = not config.pull
        if config.pull:
            self.register_buffer("start", empty_vectors(shape, like))
            self.register_buffer("pull_weights", torch.zeros(shape[:1], dtype=self.start.dtype, device=like.device))

    @torch.no_grad()
    def reset(self, start: torch.Tensor) -> None:
        """Starts from rows (C, E)."""
        self.class_embeds.copy_(start)
        if hasattr(self, "start"):
            self.start.copy_(start)

    @torch.no_grad()
    def fit(self, image_embeds: torch.Tensor, labels: torch.Tensor, probabilities: Callable[[], torch.Tensor]) -> None:
        """Sets the weight of the pull of each class: the mean zero-shot probability of it on its own images.

        Args:
            image_embeds (`torch.Tensor`):
                (N, K, E) embeddings of K views of N training images.
            labels (`torch.Tensor`):
                (N,) class indices.
            probabilities (`Callable`):
                Returns those of the zero-shot model, (N, K, C). It is called only if they are needed.
        """
        if not hasattr(self, "start"):
            return
        of_label = probabilities()[torch.arange(len(labels), device=labels.device), :, labels].mean(dim=1)  # (N,)
        sums = torch.zeros_like(self.pull_weights).index_add(0, labels, of_label.to(self.pull_weights))
        self.pull_weights.copy_(sums / labels.bincount(minlength=len(sums)))
        self.is_fitted = True

    def loss_terms(self) -> dict[str, torch.Tensor]:
        """Returns the pull, `mean_c pull_weights[c] * |class_embeds[c] - start[c]|^2`."""
        if not hasattr(self, "start"):
            return {}
        if not self.is_fitted:
            raise ValueError(
                "The weights of the pull come from the training images and are not set; call fit_class_head(model, "
                "train_dataset) before the training."
            )
        distances = (self.class_embeds - self.start).square().sum(dim=1)  # (C,)
        return {"pull": (self.pull_weights * distances).mean()}

    def baked(self, places: Sequence[int | None]) -> nn.Module:
        """Returns what is done to the logits of some classes, given the row of each: nothing."""
        return nn.Identity()


class CacheHead(nn.Module):
    """
    A cache of training images: their embeddings are keys, their labels values.

    **Attributes**:
        - **class_embeds** (`torch.Tensor`) -- (C, E), frozen.
        - **keys** (`nn.Parameter` or `torch.Tensor`) -- (N, E), normalized at the start. Trained with `train_keys`.
        - **labels** (`torch.Tensor`) -- (N,) class indices.
    """

    class_embeds: torch.Tensor
    keys: torch.Tensor
    labels: torch.Tensor

    def __init__(self, config: ClassHeadConfig, like: torch.Tensor) -> None:
        super().__init__()
        self.train_keys, self.alpha, self.beta = config.train_keys, config.alpha, config.beta
        self.register_buffer("class_embeds", empty_vectors((len(config.class_names), config.embed_width), like))
        self._set(empty_vectors((config.num_keys or 0, config.embed_width), like))
        self.register_buffer("labels", torch.zeros(config.num_keys or 0, dtype=torch.long, device=like.device))
        self.is_fitted = False
        self._values = Memo()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._values.clear()

    def _set(self, keys: torch.Tensor) -> None:
        if self.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    @torch.no_grad()
    def reset(self, start: torch.Tensor) -> None:
        """Starts from rows (C, E), with an empty cache."""
        self.class_embeds.copy_(start)

    @torch.no_grad()
    def fit(self, image_embeds: torch.Tensor, labels: torch.Tensor, probabilities: Callable[[], torch.Tensor]) -> None:
        """Fills the cache: keys are the normalized means over the views of each image.

        The arguments are those of [`LinearHead.fit`].
        """
        means = image_embeds.mean(dim=1)  # (N, E)
        self._set((means / means.norm(dim=1, keepdim=True)).to(self.class_embeds))
        self.labels = labels.clone()
        self._values.clear()
        self.is_fitted = True

    def loss_terms(self) -> dict[str, torch.Tensor]:
        """Returns no terms."""
        return {}

    def baked(self, places: Sequence[int | None]) -> nn.Module:
        """Returns what is added to the logits of some classes, given the row of each: nothing for unknown ones."""
        if not self.is_fitted:
            raise ValueError(
                "The cache of this head is empty; fill it with fit_class_head(model, train_dataset), before the "
                "training if its keys are trained."
            )
        key = tuple(places), self.keys.device, self.keys.dtype
        values = self._values.get(key, lambda: self._values_of(places))
        return CachedImages(self.keys, values, self.alpha, self.beta)

    def _values_of(self, places: Sequence[int | None]) -> torch.Tensor:
        """Returns (N, C): ones for the class of each key."""
        columns = [len(self.class_embeds) if place is None else place for place in places]
        of_classes = torch.eye(len(self.class_embeds) + 1)[:-1, columns]  # (classes, C)
        return of_classes.to(self.keys)[self.labels]


def new_head(config: ClassHeadConfig, like: torch.Tensor) -> LinearHead | CacheHead:
    """Returns the head of a configuration, not initialized, on the device of `like`."""
    return (CacheHead if config.head_type == CACHE else LinearHead)(config, like)
