"""TDA: a stream of images is classified with the help of those that came before, without training and labels.

Shapes: `B` images with `V` views each, `C` classes, `E` the width of embeddings.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from ..modeling import PromptClassificationMixin, classifier_in
from ..text import normalize
from .shared_context import check_logits, check_mode, check_softmax
from .views_of_image import check_number_of_views, entropy


if TYPE_CHECKING:
    from peft import PeftModel


class DynamicAdapter:
    """
    Classifies images one after the other by class embeddings and by two small caches of earlier images (TDA).

    The positive cache holds, for each predicted class, the images of which the classifier was most certain. Images
    that are similar to them get a higher logit of that class. The negative cache holds images of medium certainty.
    Images that are similar to them get lower logits of all classes that were at all probable for them. An image is put
    into the caches before it is classified itself, so the answers depend on the order of the images. The settings are
    those of the authors for ImageNet, whatever the data are; the authors chose others for every data set.

    One object is for one stream, in one thread.

    Args:
        class_embeds (`torch.Tensor`):
            (C, E), normalized or not.
        logit_scale (`float`, *optional*, defaults to 100.0):
            The factor of the cosines in the logits.
        positive_size (`int`, *optional*, defaults to 3):
            The number of images of each class in the positive cache.
        positive_weight, positive_sharpness (`float`, *optional*, default to 2.0 and 5.0):
            The weight of the positive cache in the logits, and how fast it falls with the distance.
        negative_size (`int`, *optional*, defaults to 2):
            The number of images of each class in the negative cache; 0 for no negative cache.
        negative_weight, negative_sharpness (`float`, *optional*, default to 0.117 and 1.0):
            The same of the negative cache.
        entropy_range (`tuple[float, float]`, *optional*, defaults to `(0.2, 0.5)`):
            Images with an entropy strictly in between go into the negative cache, too. Entropies are in nats, divided
            by the binary logarithm of C, as in the code of the authors.
        probability_range (`tuple[float, float]`, *optional*, defaults to `(0.03, 1.0)`):
            The negative cache counts against classes of a probability strictly in between.
        selection (`float`, *optional*, defaults to 0.1):
            The share of the views to keep, those of lowest entropy, if images have several.

    Raises:
        ValueError: If class embeddings are no matrix of finite values, or an argument is not of the kind described
            above.

    **Attributes**:
        - **num_images** (`int`): How many images were seen since the start or the last [`reset`].

    Example:

    ```py
    >>> adapter = DynamicAdapter.of(model)
    >>> labels = adapter(image_embeds).logits.argmax(dim=-1)
    ```

    Source: Karmanov et al., Efficient Test-Time Adaptation of Vision-Language Models (CVPR 2024).
    """

    def __init__(
        self,
        class_embeds: torch.Tensor,
        logit_scale: float = 100.0,
        positive_size: int = 3,
        positive_weight: float = 2.0,
        positive_sharpness: float = 5.0,
        negative_size: int = 2,
        negative_weight: float = 0.117,
        negative_sharpness: float = 1.0,
        entropy_range: tuple[float, float] = (0.2, 0.5),
        probability_range: tuple[float, float] = (0.03, 1.0),
        selection: float = 0.1,
    ) -> None:
        if not isinstance(class_embeds, torch.Tensor):
            raise TypeError(
                f"class_embeds must be a tensor (C, E), got a {type(class_embeds).__name__}; DynamicAdapter.of(model) "
                "takes those of a classifier."
            )
        if class_embeds.ndim != 2 or not len(class_embeds) or not torch.isfinite(class_embeds).all():
            raise ValueError(
                f"class_embeds must be (C, E) with finite values, one row for each class, got "
                f"{tuple(class_embeds.shape)}."
            )
        for name, size, smallest in (("positive_size", positive_size, 1), ("negative_size", negative_size, 0)):
            if not isinstance(size, int) or size < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {size!r}.")
        if not 0 < selection <= 1:
            raise ValueError(f"selection must be a share of the views, above 0 and up to 1, got {selection!r}.")
        with torch.inference_mode(False), torch.no_grad():
            self.class_embeds, self.logit_scale = normalize(class_embeds), float(logit_scale)
        self.sizes = positive_size, negative_size
        self.positive_weight, self.positive_sharpness = positive_weight, positive_sharpness
        self.negative_weight, self.negative_sharpness = negative_weight, negative_sharpness
        self.entropy_range, self.probability_range, self.selection = entropy_range, probability_range, selection
        self.reset()

    @classmethod
    def of(cls, model: PromptClassificationMixin | PeftModel, **settings) -> DynamicAdapter:
        """Returns an adapter for the classes of a classifier, with its present class embeddings and its scale.

        Its `temperature`, if there is one, belongs to other answers and is not applied.

        Args:
            model (`PromptClassificationMixin` or `PeftModel`):
                A classifier in eval mode. It is not changed.
            settings (*optional*):
                Further arguments of the class.

        Raises:
            TypeError: If the model is not a classifier.
            ValueError: If it is in training mode, an image can have several labels, or the active adapter makes other
                class embeddings for each image, or changes logits.
        """
        classifier = classifier_in(model, "DynamicAdapter")
        check_mode(classifier)
        check_softmax(classifier)
        check_logits(classifier)
        layout = classifier.prompt_layout
        if layout is not None and layout.image_conditioned:
            raise ValueError(
                "The active adapter makes its class embeddings for each image, so a cache has none to start from; "
                "activate another adapter, or disable it."
            )
        with torch.inference_mode(False), torch.no_grad():
            class_embeds, logit_scale = classifier.get_class_embeds(), classifier.log_scale.exp().item()
        return cls(class_embeds, logit_scale, **settings)

    def reset(self) -> None:
        """Empties both caches, for another stream."""
        self.num_images = 0
        self.positive, self.negative = (_Cache(self.class_embeds, size) for size in self.sizes)

    @torch.no_grad()
    def __call__(self, image_embeds: torch.Tensor) -> ImageClassifierOutput:
        """Classifies images in their order.

        Args:
            image_embeds (`torch.Tensor`):
                (B, E), or (B, V, E) with V views of each image: projected image features, normalized or not, as they
                are compared with the class embeddings.

        Returns:
            `ImageClassifierOutput`: `logits` (B, C), without the bias of SigLIP, which is the same for all classes.

        Raises:
            ValueError: If the shape or a value cannot be right, or there are too few views. The caches are as before
                then.
        """
        width = self.class_embeds.shape[1]
        if image_embeds.ndim not in (2, 3) or image_embeds.shape[-1] != width or not len(image_embeds):
            raise ValueError(
                f"image_embeds must be (B, {width}), or (B, V, {width}) with V views of each image, got "
                f"{tuple(image_embeds.shape)}."
            )
        if not torch.isfinite(image_embeds).all():
            raise ValueError("There are NaN or Inf in image_embeds.")
        with torch.inference_mode(False), torch.autocast(self.class_embeds.device.type, enabled=False):
            embeds = normalize(image_embeds.to(self.class_embeds))
            embeds = embeds[:, None] if embeds.ndim == 2 else embeds
            num_kept = 1 if image_embeds.ndim == 2 else check_number_of_views(embeds.shape[1], self.selection)
            return ImageClassifierOutput(logits=torch.stack([self._classify(views, num_kept) for views in embeds]))

    def _classify(self, views: torch.Tensor, num_kept: int) -> torch.Tensor:
        """Returns the logits (C,) of one image by its views (V, E), after it was put into the caches."""
        logits = self.logit_scale * views @ self.class_embeds.T  # (V, C)
        kept = entropy(logits).argsort(stable=True)[:num_kept]
        embed, logits, probabilities = views[kept].mean(dim=0), logits[kept], logits[kept].softmax(dim=-1).mean(dim=0)
        uncertainty = float(torch.special.entr(probabilities).sum())
        logits = logits.mean(dim=0)
        predicted = int(logits.argmax())
        self.num_images += 1
        self.positive.add(predicted, embed, uncertainty)
        relative = uncertainty / math.log2(len(logits)) if len(logits) > 1 else 0.0
        if self.entropy_range[0] < relative < self.entropy_range[1]:
            self.negative.add(predicted, embed, uncertainty, probabilities)
        return logits + self._of_positive(embed) - self._of_negative(embed)

    def _of_positive(self, embed: torch.Tensor) -> torch.Tensor:
        """Returns what the positive cache adds to the logits (C,)."""
        classes, _, keys, _ = self.positive.content()
        affinity = self.positive_weight * torch.exp(-self.positive_sharpness * (1 - keys @ embed))
        return torch.zeros_like(self.class_embeds[:, 0]).index_add(0, classes, affinity)

    def _of_negative(self, embed: torch.Tensor) -> torch.Tensor:
        """Returns what the negative cache takes from the logits (C,)."""
        _, _, keys, probabilities = self.negative.content()
        low, high = self.probability_range
        counts = ((low < probabilities) & (probabilities < high)).to(keys)  # (items, C)
        return self.negative_weight * torch.exp(-self.negative_sharpness * (1 - keys @ embed)) @ counts


class _Cache:
    """The images of lowest entropy among those that were predicted to be of each class."""

    def __init__(self, class_embeds: torch.Tensor, size: int) -> None:
        self.size, self.no_class_embeds = size, class_embeds[:0]
        # By class, sorted by entropy: entropy, embedding (E,) and probabilities (C,).
        self.items: dict[int, list[tuple[float, torch.Tensor, torch.Tensor]]] = {}
        self.num_classes = len(class_embeds)

    def add(self, label: int, embed: torch.Tensor, uncertainty: float, probabilities=None) -> None:
        """Adds an image to those of its class, unless these are enough, and of lower entropy."""
        items = self.items.setdefault(label, []) if self.size else []
        if len(items) == self.size:
            if not items or uncertainty >= items[-1][0]:
                return
            items.pop()
        items.append((uncertainty, embed, embed.new_zeros(0) if probabilities is None else probabilities))
        items.sort(key=lambda item: item[0])

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns classes, entropies, embeddings (items, E) and probabilities (items, C) of all images."""
        items = [(label, *item) for label in sorted(self.items) for item in self.items[label]]
        like = self.no_class_embeds
        if not items:
            return like.new_zeros(0, dtype=torch.long), like[:, 0], like, like.new_zeros(0, self.num_classes)
        labels, entropies, embeds, probabilities = zip(*items)
        return (
            torch.tensor(labels, device=like.device),
            torch.tensor(entropies, device=like.device),
            torch.stack(embeds),
            torch.stack(probabilities),
        )
