"""Class embeddings for any context vectors, and their gradients: for a context that is tuned to a single image.

Shapes: `P` contexts, `n` vectors of width `D`, `C` classes in chunks of `K`, `E` the width of class embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..towers import frozen_copy, text_embeddings_of, text_side
from ..tuner.base_layer import CLIPPromptLayer
from ..tuner.layer import CLIPTextLearnableEmbeddings
from ..tuner.layout import PromptLayout
from .casts import keep_casts
from .encoder import Chunk, ClassEncoder
from .prompts import ClassPrompts


class ContextEncoder:
    """
    Encodes the classes of a classifier with context vectors that are handed to it.

    It works on a copy of the text tower that shares all weights, so that the classifier, its adapters, gradients and
    kept results stay as they are, and other threads can use the classifier meanwhile.

    Args:
        model (`PromptClassificationMixin`):
            A classifier.
        prompts (`ClassPrompts`):
            The prompts of its C classes, written for `layout`.
        layout (`PromptLayout`):
            Where the vectors stand. They are the same for all classes.
    """

    def __init__(self, model: nn.Module, prompts: ClassPrompts, layout: PromptLayout) -> None:
        copied = frozen_copy(model, {id(part): part for part in _beside_the_text(model)})
        embeddings = text_embeddings_of(copied.text_model)
        table = embeddings.get_base_layer() if isinstance(embeddings, CLIPPromptLayer) else embeddings
        layer = CLIPTextLearnableEmbeddings(table, "context", layout)
        copied.text_model.base_model.embeddings = layer.requires_grad_(False).eval()
        per_image = replace(layout, image_conditioned=True)  # the vectors of each text are handed over
        encoder = ClassEncoder(model.class_encoder.path, model.class_encoder.batch_size)
        self.chunks, self.prompts_at_once = encoder.prepare(copied, prompts, per_image)
        self.classes_of_chunks = [len(chunk.classes) for chunk in self.chunks]
        self.token_table = layer.token_table
        self._encode = keep_casts(lambda chunk, vectors: chunk.encode(copied, per_image, vectors), text_side(copied))

    @property
    def contexts_at_once(self) -> int:
        """How many contexts to encode at a time, so that memory grows neither with images nor with classes."""
        return max(1, self.prompts_at_once // max(self.classes_of_chunks))

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the class embeddings (P, C, E), L2-normalized, of contexts (P, n, D), without gradients."""
        parts = vectors.split(self.contexts_at_once)
        return torch.cat([torch.cat([self._encode(chunk, part) for part in parts]) for chunk in self.chunks], dim=1)

    def gradients(self, vectors: torch.Tensor, of_embeds: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns the gradients (P, n, D) of losses, each with respect to its own context.

        Args:
            vectors (`torch.Tensor`):
                (P, n, D). A few are handled at a time, and one chunk of classes.
            of_embeds (`Callable`):
                Returns the gradients (P, C, E) of the losses with respect to the class embeddings (P, C, E).
        """
        factor, of_embeds = scaled(of_embeds(self.encode(vectors)))
        parts = zip(*(tensor.split(self.contexts_at_once) for tensor in (vectors, of_embeds)))
        return factor * torch.cat([self._gradients(*part) for part in parts])

    def _gradients(self, vectors: torch.Tensor, of_embeds: torch.Tensor) -> torch.Tensor:
        vectors, total = vectors.detach().requires_grad_(), torch.zeros_like(vectors)
        for chunk, gradient in zip(self.chunks, of_embeds.split(self.classes_of_chunks, dim=1)):
            total += torch.autograd.grad(self.encode_chunk(chunk, vectors), vectors, gradient)[0]
        return total

    def encode_chunk(self, chunk: Chunk, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the class embeddings (P, K, E) of a chunk, with their graph, of contexts (P, n, D)."""
        with torch.enable_grad():
            return self._encode(chunk, vectors)


class SharedContext:
    """
    One context of many images: its class embeddings, and the gradients of each image's loss with respect to it.

    The loss of an image depends on the context by way of the class embeddings only, and their Jacobian is the same for
    all images. So the text tower runs forward once, and backward once for each image. Of more than one chunk of
    classes no graph is kept: each chunk is encoded again, once for all images of a call of [`gradients`].

    Backward passes run one after the other. On a CPU, `is_grads_batched=True` took more processor time (2.5 s instead
    of 2.2 s for 4 images and 100 classes), and its `vmap` has no rules for all operations of adapters. The script
    benchmarks/test_time.py measures both.

    Args:
        encoder (`ContextEncoder`):
            The encoder of the classes.
        vectors (`torch.Tensor`):
            (n, D).

    **Attributes**:
        - **embeds** (`torch.Tensor`): (C, E), the class embeddings, without a graph.
    """

    def __init__(self, encoder: ContextEncoder, vectors: torch.Tensor) -> None:
        self.encoder = encoder
        self.vectors = vectors[None].detach().requires_grad_()  # (1, n, D)
        self.output = encoder.encode_chunk(encoder.chunks[0], self.vectors) if len(encoder.chunks) == 1 else None
        self.embeds = (encoder.encode(self.vectors) if self.output is None else self.output.detach())[0]

    def gradients(self, of_embeds: torch.Tensor) -> torch.Tensor:
        """Returns the gradients (B, n, D) of B losses from those with respect to the class embeddings (B, C, E)."""
        factor, of_embeds = scaled(of_embeds)
        total = of_embeds.new_zeros(len(of_embeds), *self.vectors.shape[1:])
        for chunk, part in zip(self.encoder.chunks, of_embeds.split(self.encoder.classes_of_chunks, dim=1)):
            output = self.encoder.encode_chunk(chunk, self.vectors) if self.output is None else self.output
            for image, gradient in enumerate(part):
                total[image] += torch.autograd.grad(output, self.vectors, gradient[None], retain_graph=True)[0][0]
            del output
        return factor * total


def scaled(of_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factors (B, 1, 1), and gradients (B, C, E) divided by them, whose largest value is then near 1.

    The gradients of an image of which a classifier is certain are tiny. In a tower in half precision they would be
    lost, and AdamW looks at their signs only.
    """
    exponents = of_embeds.abs().amax(dim=(1, 2), keepdim=True).frexp().exponent.clamp(-100, 100)
    factor = torch.ones_like(of_embeds[:, :1, :1]).ldexp(exponents)
    return factor, of_embeds / factor


def _beside_the_text(model: nn.Module) -> list[nn.Module]:
    """Returns the parts of a classifier that are no parts of its text side."""
    return [part for part in model.children() if not any(part is of_text for of_text in text_side(model))]
