"""Test-time prompt tuning: a context tuned to each image without a label, for many images at once (TPT, C-TPT, R-TPT).

Shapes: `B` images with `V` views each, of which `K` are kept; `n` vectors of width `D`; `C` classes, `E` the width of
embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from ..modeling import PromptClassificationMixin, classifier_in
from ..text import normalize
from ..text.cache import Memo
from ..text.contexts import ContextEncoder, SharedContext
from ..towers import execution_device, takes_patches
from ..tuner.layout import PromptLayout
from .shared_context import check_logits, check_mode, check_softmax, shared_context
from .views_of_image import NUM_NEIGHBORS, check_number_of_views, dispersion, entropy, entropy_of_mean, view_weights


if TYPE_CHECKING:
    from peft import PeftModel
    from PIL import Image


TPT, C_TPT, R_TPT = "tpt", "c-tpt", "r-tpt"
OBJECTIVES = (TPT, C_TPT, R_TPT)


@dataclass
class TunedClassifierOutput(ImageClassifierOutput):
    """
    `ImageClassifierOutput` of images that a context was tuned to.

    Args:
        loss (`torch.Tensor`):
            (B,), the objective of each image before the first step.
        logits (`torch.Tensor`):
            (B, C), the answers with the tuned contexts.
        entropies (`torch.Tensor`):
            (B, V), the entropy of the prediction for each view, in nats, before the first step.
        kept_views (`torch.Tensor`):
            (B, K), the views that the objective looks at, of lowest entropy first.
        gradients (`torch.Tensor`):
            (B, n, D), the gradient of the first step.
        vectors (`torch.Tensor`):
            (B, n, D), the tuned contexts.
    """

    entropies: torch.Tensor | None = None
    kept_views: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    vectors: torch.Tensor | None = None


class TestTimeTuner:
    """
    Tunes the context of a classifier to every single image, without a label, and classifies the image with it.

    An image is seen in many views: as it is, and cropped at random. The views of which the classifier is most certain
    are kept, and the context takes a step of AdamW towards predictions that are certain together. Every image starts
    from the same vectors, with a new optimizer. The vectors are those of the active adapter, which all classes and
    images have to share, or without one the words in front of `{}` of the classifier's template. Prompts in deeper
    layers and in the image tower stay as they are. The classifier itself is not changed. Its `temperature`, if there
    is one, belongs to the answers without tuning and is not applied.

    Many images take one pass of the text tower, one backward pass each, and one pass without gradients for their tuned
    contexts; see [`~text.contexts.SharedContext`]. The result is that of one image at a time.

    Args:
        model (`PromptClassificationMixin` or `PeftModel`):
            A classifier in eval mode, with an adapter or without one.
        objective (`str`, *optional*, defaults to `"tpt"`):
            `"tpt"` minimizes the entropy of the mean prediction for the kept views. `"c-tpt"` subtracts
            `dispersion_weight` times the mean distance of the class embeddings from their mean, for probabilities that
            are calibrated. `"r-tpt"` minimizes the mean of the views' entropies, and answers with the sum over all
            views, weighted by how similar a view is to its 20 most similar ones, for images that were tampered with.
        views (`Callable`, *optional*):
            Makes (B, V, 3, H, W) views of a list of B images, as [`~data.RandomViews`] does. It is not needed if the
            tuner is called with tensors.
        selection (`float`, *optional*, defaults to 0.1):
            The share of the views to keep. They are chosen once, before the first step.
        steps (`int`, *optional*, defaults to 1):
            The number of steps.
        learning_rate (`float`, *optional*, defaults to 0.005):
            The learning rate. The first step of AdamW moves each value by about as much, whatever its gradient.
        dispersion_weight (`float`, *optional*, defaults to 50.0):
            The weight of C-TPT's term, lambda in the paper: 50 for fine-grained classes, 20 for shifted domains.
        batch_size (`int`, *optional*, defaults to 16):
            The number of images whose contexts are tuned at a time. Views go through the image tower one image at a
            time.

    Raises:
        TypeError: If the model is not a classifier.
        ValueError: If an argument is not one of those described above.

    Example:

    ```py
    >>> tuner = TestTimeTuner(model, views=RandomViews(image_processor))
    >>> labels = tuner(images).logits.argmax(dim=-1)
    ```

    Source: Shu et al., Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models (NeurIPS 2022);
    Yoon et al., C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models via Text Feature Dispersion (ICLR
    2024); Sheng et al., R-TPT: Improving Adversarial Robustness of Vision-Language Models through Test-Time Prompt
    Tuning (CVPR 2025).
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self,
        model: PromptClassificationMixin | PeftModel,
        objective: str = TPT,
        views: Callable[[list[Image.Image]], torch.Tensor] | None = None,
        selection: float = 0.1,
        steps: int = 1,
        learning_rate: float = 5e-3,
        dispersion_weight: float = 50.0,
        batch_size: int = 16,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}.")
        if not (_is_number(selection) and 0 < selection <= 1):
            raise ValueError(f"selection must be a share of the views, above 0 and up to 1, got {selection!r}.")
        if not (_is_number(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be a positive number, got {learning_rate!r}.")
        if not (_is_number(dispersion_weight) and dispersion_weight >= 0):
            raise ValueError(f"dispersion_weight must be a number of at least 0, got {dispersion_weight!r}.")
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if views is not None and not callable(views):
            raise TypeError(
                f"views must be a function that makes views of images, such as RandomViews(image_processor), got a "
                f"{type(views).__name__}; tensors of views are what the tuner is called with."
            )
        self.model, self.objective, self.views = model, objective, views
        self.selection, self.steps, self.learning_rate = selection, steps, learning_rate
        self.dispersion_weight, self.batch_size = dispersion_weight, batch_size
        self._layouts = Memo()
        self._classifier()

    def __call__(
        self,
        images: torch.Tensor | Image.Image | Sequence[Image.Image] | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> TunedClassifierOutput:
        """Tunes a context to every image, and classifies the image with it.

        Args:
            images (`torch.Tensor`, `PIL.Image.Image` or `list[PIL.Image.Image]`, *optional*):
                The views (B, V, 3, H, W) of B images, as the processor returns them, the image itself first; or
                images, of which `views` makes them.
            image_embeds (`torch.Tensor`, *optional*):
                (B, V, E) instead of `images`: the projected image features of the views, normalized or not, as from
                [`embed_views`].

        Returns:
            `TunedClassifierOutput`: An `ImageClassifierOutput` with the `logits` (B, C), and what led to them.

        Raises:
            TypeError: If images are of another type.
            ValueError: If there are too few views, their shape or values cannot be right, the classifier is in
                training mode or cannot be tuned this way, or the active adapter has no vectors that all classes and
                images share.
        """
        return self._tune(images, image_embeds)

    def embed_views(self, images: torch.Tensor | Image.Image | Sequence[Image.Image]) -> torch.Tensor:
        """Returns the embeddings (B, V, E) of views, which do not depend on the objective.

        Args:
            images (`torch.Tensor`, `PIL.Image.Image` or `list[PIL.Image.Image]`):
                The views or the images, as for a call of the tuner.
        """
        classifier = self._classifier()
        check_mode(classifier)
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat(list(self._embeds_in_batches(classifier, images)))

    def _tune(self, images, image_embeds, gradients=None, similarity=None) -> TunedClassifierOutput:
        """Does what a call does. For comparisons with other code, the gradients (B, n, D) of the first step can be
        given, and the similarity (B, V, V) of views, whose values of at least 1 are then taken for its diagonal."""
        if (images is None) == (image_embeds is None):
            raise ValueError(f"Give either images or image_embeds, {'neither was' if images is None else 'not both'}.")
        self.check()
        classifier = self._classifier()
        layout, vectors = self._context(classifier)
        with torch.inference_mode(False), torch.no_grad():
            if image_embeds is None:
                batches = self._embeds_in_batches(classifier, images)
            else:
                batches = iter(self._checked_embeds(classifier, image_embeds).split(self.batch_size))
            first = next(batches)  # bad images are found before the text tower runs
            run = _Run(self, classifier, layout, vectors)
            outputs, start = [], 0
            for embeds in chain([first], batches):
                given = [None if values is None else values[start : start + len(embeds)] for values in
                         (gradients, similarity)]  # fmt: skip
                outputs.append(run.tune(embeds, *given))
                start += len(embeds)
            fields: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
            return TunedClassifierOutput(**fields)

    def check(self) -> None:
        """Raises what a call would raise whatever the images are: that the classifier cannot be tuned this way."""
        classifier = self._classifier()
        check_mode(classifier)
        check_softmax(classifier)
        check_logits(classifier)
        self._context(classifier)

    def _classifier(self) -> PromptClassificationMixin:
        return classifier_in(self.model, "TestTimeTuner")

    def _context(self, classifier) -> tuple[PromptLayout, torch.Tensor | None]:
        return shared_context(classifier, self._layouts)

    def _embeds_in_batches(self, classifier, images) -> Iterator[torch.Tensor]:
        """Yields the embeddings (b, V, E) of the views of at most `batch_size` images at a time."""
        device, batch = execution_device(classifier), []
        for views in self._views_of_each(classifier, images):
            batch.append(classifier.get_image_features(pixel_values=views.to(device)).pooler_output)
            if len(batch) == self.batch_size:
                yield _checked_values(torch.stack(batch), "the embeddings of the views")
                batch = []
        if batch:
            yield _checked_values(torch.stack(batch), "the embeddings of the views")

    def _views_of_each(self, classifier, images) -> Iterator[torch.Tensor]:
        """Yields the views (V, 3, H, W) of one image after the other, which are many values."""
        if isinstance(images, torch.Tensor):
            self._check_views(classifier, images)
            yield from images
            return
        for image in self._checked_images(images):
            views = self.views([image])
            self._check_views(classifier, views)
            yield views[0]

    def _checked_images(self, images) -> Sequence[Image.Image]:
        from PIL import Image

        images = [images] if isinstance(images, Image.Image) else images
        if not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
            kind = type(images[0] if isinstance(images, Sequence) and len(images) else images).__name__
            raise TypeError(
                "images must be a tensor of views (B, V, 3, H, W), an image of Pillow or a list of them, got "
                f"{kind}; open files with clip_prompt_peft.image_files.decode_image."
            )
        if not images:
            raise ValueError("There are no images; give at least one.")
        if self.views is None:
            raise ValueError(
                "The tuner makes no views of images by itself; give it views=RandomViews(image_processor), from "
                "clip_prompt_peft.data, or call it with the views (B, V, 3, H, W)."
            )
        return images

    def _check_views(self, classifier, views: torch.Tensor) -> None:
        if takes_patches(classifier.vision_model.embeddings):
            raise ValueError(
                f"{type(classifier).__name__} takes patches of images of any shape, which are no views of one size; "
                "call the tuner with image_embeds, (B, V, E), of views that you have embedded with get_image_features."
            )
        if views.ndim != 5 or not len(views):
            raise ValueError(
                "The views must be (B, V, 3, H, W): B images, V views of each, the image itself first; got "
                f"{tuple(views.shape)}."
            )
        self._check_number(views.shape[1])

    def _checked_embeds(self, classifier, image_embeds: torch.Tensor) -> torch.Tensor:
        if not isinstance(image_embeds, torch.Tensor):
            raise TypeError(f"image_embeds must be a tensor, got a {type(image_embeds).__name__}.")
        width = classifier.embed_width
        if image_embeds.ndim != 3 or image_embeds.shape[2] != width or not len(image_embeds):
            raise ValueError(
                f"image_embeds must be (B, V, {width}), the projected image features of V views of each of B images, "
                f"got {tuple(image_embeds.shape)}."
            )
        self._check_number(image_embeds.shape[1])
        return _checked_values(image_embeds.detach().to(execution_device(classifier)), "image_embeds")

    def _check_number(self, num_views: int) -> None:
        check_number_of_views(num_views, self.selection)
        if self.objective == R_TPT and num_views <= NUM_NEIGHBORS:
            raise ValueError(
                f"{R_TPT!r} weighs each view by the {NUM_NEIGHBORS} views that are most similar to it, so it needs at "
                f"least {NUM_NEIGHBORS + 1} views of each image, got {num_views}."
            )


class _Run:
    """The tuning of some images with one state of the classifier."""

    def __init__(self, tuner: TestTimeTuner, classifier, layout: PromptLayout, vectors) -> None:
        self.tuner, self.classifier = tuner, classifier
        prompts = classifier.build_prompts(classifier.class_names, classifier.prompt_template, layout)
        self.encoder = ContextEncoder(classifier, prompts, layout)
        if vectors is None:
            vectors = self.encoder.token_table(torch.tensor(layout.replaced_token_ids, device=self._device))
        self.vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))  # (n, D)
        self.shared = SharedContext(self.encoder, self.vectors)

    @property
    def _device(self) -> torch.device:
        return execution_device(self.classifier.text_model)

    def tune(self, image_embeds: torch.Tensor, gradients=None, similarity=None) -> TunedClassifierOutput:
        """Tunes a context to each of B images by the embeddings (B, V, E) of their views."""
        class_embeds = self.shared.embeds
        shape = image_embeds.shape[:2]
        image_embeds = self.classifier.image_head(image_embeds.flatten(0, 1)).unflatten(0, shape)
        image_embeds = normalize(image_embeds.to(class_embeds))
        entropies = entropy(self.logits(image_embeds, class_embeds))  # (B, V)
        num_kept = check_number_of_views(image_embeds.shape[1], self.tuner.selection)
        kept_views = entropies.argsort(dim=1, stable=True)[:, :num_kept]
        kept = image_embeds.take_along_dim(kept_views[:, :, None], dim=1)  # (B, K, E)
        of_embeds, loss = self.objective_gradients(kept, class_embeds.expand(len(kept), -1, -1))
        if gradients is None:
            gradients = self.shared.gradients(of_embeds)
        vectors = self.step(kept, gradients.to(self.vectors))
        tuned = self.encoder.encode(vectors)  # (B, C, E)
        return TunedClassifierOutput(
            loss=loss,
            logits=self.answer(image_embeds, tuned, similarity),
            entropies=entropies,
            kept_views=kept_views,
            gradients=gradients,
            vectors=vectors,
        )

    def step(self, kept: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Returns the contexts (B, n, D) after all steps. AdamW treats every value on its own, so it is one for each
        image."""
        vectors = self.vectors.repeat(len(kept), 1, 1)
        optimizer = torch.optim.AdamW([vectors], lr=self.tuner.learning_rate)
        for step in range(self.tuner.steps):
            if step:  # from the second step on, every image has class embeddings of its own
                gradients = self.encoder.gradients(vectors, lambda embeds: self.objective_gradients(kept, embeds)[0])
            vectors.grad = gradients.clone()
            optimizer.step()
        return vectors.detach()

    @torch.enable_grad()
    def objective_gradients(self, kept: torch.Tensor, class_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradients (B, C, E) of the objectives with respect to the class embeddings, and the objectives.

        Args:
            kept (`torch.Tensor`):
                (B, K, E), the embeddings of the kept views.
            class_embeds (`torch.Tensor`):
                (B, C, E).
        """
        class_embeds = class_embeds.detach().requires_grad_()
        logits = self.logits(kept, class_embeds)
        loss = entropy(logits).mean(dim=1) if self.tuner.objective == R_TPT else entropy_of_mean(logits)
        if self.tuner.objective == C_TPT:
            loss = loss - self.tuner.dispersion_weight * dispersion(class_embeds)
        (gradients,) = torch.autograd.grad(loss.sum(), class_embeds)
        return gradients, loss.detach()

    def answer(self, image_embeds: torch.Tensor, class_embeds: torch.Tensor, similarity=None) -> torch.Tensor:
        """Returns the logits (B, C) of images by their tuned class embeddings (B, C, E)."""
        if self.tuner.objective != R_TPT:
            return self.logits(image_embeds[:, :1], class_embeds)[:, 0]
        with torch.autocast(image_embeds.device.type, enabled=False):
            weights = view_weights(image_embeds, similarity)  # (B, V)
            return (weights[:, None] @ self.logits(image_embeds, class_embeds))[:, 0]

    def logits(self, image_embeds: torch.Tensor, class_embeds: torch.Tensor) -> torch.Tensor:
        """Returns (B, V, C) for normalized embeddings (B, V, E) and (C, E) or (B, C, E), as the classifier does."""
        scale, bias = self.classifier.log_scale.detach().exp(), getattr(self.classifier, "logit_bias", None)
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits = scale.to(class_embeds) * (image_embeds @ class_embeds.mT)
            return logits if bias is None else logits + bias.detach().to(class_embeds)


def _checked_values(values: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(values).all():
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(f"There are NaN or Inf in {name}, first in view {bad[1]} of image {bad[0]} of the batch.")
    return values


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
