"""What the classifier calls to turn its prompts into class embeddings."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from transformers import CLIPModel

from ..towers import text_embeddings_of
from ..tuner.layout import PromptLayout
from .cache import ClassEmbedsCache, trained_parameters
from .chunks import encode_by_images, encode_in_chunks, gather_shares, num_processes, share_of_classes
from .packing import (
    PATHS,
    PLAIN,
    PackedRows,
    PlainRows,
    attention_of,
    build_rows,
    fastest_exact_path,
    num_shared_positions,
    what_decides,
)
from .prompts import ClassPrompts


AUTO = "auto"
MANY_CLASSES = 256  # more than this are encoded in chunks, and shared between processes
CHUNK = 128
MOST_STATES = 1024  # of a model, whose fastest path is remembered
PROMPTS_AT_ONCE = 256  # where every image has prompts of its own


class ClassEncoder:
    """
    Encodes all class prompts of a CLIP: exactly, and as cheaply as the model allows.

    Args:
        path (`str`, defaults to `"auto"`):
            `"plain"` runs every prompt at full length, as CoOp does; `"cut"` ends the rows after the longest prompt;
            `"packed"` computes what the prompts have in common once. `"auto"` takes the fastest that is exact for the
            model; `"plain"` turns all cleverness off, for debugging.
        batch_size (`int`, *optional*, defaults to `"auto"`):
            Classes at a time. While training, all chunks but one are computed a second time for their gradient, so
            that memory does not grow with the number of classes. `None` takes all at once; `"auto"` does so up to 256
            classes, and takes 128 at a time beyond.
        across_processes (`bool`, defaults to `"auto"`):
            Whether each process of a distributed training encodes its share of the classes only. `True` does so in
            every call, evaluation included, so all processes must make the same calls; `"auto"` only while training
            more than 256 classes. Gradients must be averaged over the processes, as DistributedDataParallel does.
            Where processes may have different numbers of batches (`join_uneven_inputs`) it must be `False`: a process
            that has no more would be waited for, up to the timeout.

    While evaluating (in eval mode, and with no gradient wanted), the result is kept until something that it depends on
    changes; results for several adapters, or lists of classes, are kept beside each other.
    """

    def __init__(self, path: str = AUTO, batch_size: int | str | None = AUTO, across_processes: bool | str = AUTO):
        self.path = path
        self.batch_size = batch_size
        self.across_processes = across_processes
        self._forget()

    def _forget(self) -> None:
        self._cache = ClassEmbedsCache()
        self._chunks: tuple[ClassPrompts, tuple, list] | None = None
        self._fastest_paths: dict[Hashable, str] = {}

    def __getstate__(self) -> dict:
        # copies, and pickles, start with nothing kept
        return {"path": self.path, "batch_size": self.batch_size, "across_processes": self.across_processes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __call__(
        self,
        model: CLIPModel,
        prompts: ClassPrompts,
        layout: PromptLayout | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            model: a CLIP with a text tower.
            prompts: of C classes.
            layout: of the active prompt adapter, if there is one.
            image_embeds: (B, E), L2-normalised, for an adapter that is conditioned on the image.

        Returns:
            (C, E) class embeddings, L2-normalised, in float32 at least; differentiable with respect to everything in
            the text tower that requires a gradient. Not to be changed in place. (B, C, E) with `image_embeds`; those
            are neither kept nor shared between processes.

        Raises:
            ValueError: a setting that does not exist, or that is not exact for this model.
        """
        self._check_settings()
        if image_embeds is not None:
            return self._encode_for_images(model, prompts, layout, image_embeds)
        if torch.compiler.is_compiling():  # one graph, which cannot look at the state of the model
            return self._encode(model, prompts, layout)
        if model.training or (torch.is_grad_enabled() and trained_parameters(model)):
            self._cache.clear()
            return self._encode(model, prompts, layout)
        return self._cache.get(model, prompts, lambda: self._encode(model, prompts, layout))

    def clear(self) -> None:
        """Drops the embeddings that are kept. Only needed after writing to a frozen weight through its `.data`."""
        self._cache.clear()

    def _check_settings(self) -> None:
        if self.path not in (AUTO, *PATHS):
            raise ValueError(f"path must be {AUTO!r} or one of {', '.join(map(repr, PATHS))}, got {self.path!r}.")
        size = self.batch_size
        if size not in (AUTO, None) and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"batch_size must be a positive integer, None or {AUTO!r}, got {size!r}.")
        if self.across_processes not in (AUTO, True, False):
            raise ValueError(f"across_processes must be True, False or {AUTO!r}, got {self.across_processes!r}.")

    def _encode(self, model, prompts, layout) -> torch.Tensor:
        num_classes = len(prompts.texts)
        is_sharded = self._is_sharded(model, num_classes)
        classes = share_of_classes(num_classes) if is_sharded else range(num_classes)
        chunks = self._chunks_of(model, prompts, layout, classes)
        if len(chunks) == 1:
            embeds = chunks[0].encode(model)[0]
        else:
            embeds = encode_in_chunks(lambda chunk: chunk.encode(model)[0], chunks, trained_parameters(model))
        return gather_shares(embeds, num_classes) if is_sharded else embeds

    def _encode_for_images(self, model, prompts, layout, image_embeds) -> torch.Tensor:
        vectors = text_embeddings_of(model.text_model).row_vectors(image_embeds)  # (B, n, D)
        chunks = self._chunks_of(model, prompts, layout, range(len(prompts.texts)))
        pairs = [(chunk, vectors.split(max(1, PROMPTS_AT_ONCE // len(chunk.classes)))) for chunk in chunks]
        return encode_by_images(lambda chunk, part: chunk.encode(model, part), pairs)  # (B, C, E)

    def _is_sharded(self, model, num_classes: int) -> bool:
        if num_processes() == 1 or num_classes < num_processes():
            return False
        if self.across_processes != AUTO:
            return self.across_processes
        is_trained = model.training and torch.is_grad_enabled() and bool(trained_parameters(model))
        return is_trained and num_classes > MANY_CLASSES

    def _chunks_of(self, model, prompts, layout, classes: range) -> list[PlainRows | PackedRows]:
        """The rows for the text tower, kept from call to call: they change with prompts and settings only."""
        settings = self.path, self.batch_size, getattr(layout, "num_shared_positions", None)
        key = (classes, settings, model.text_model.device, attention_of(model.text_model))
        kept = self._chunks  # read once: another thread may exchange it
        if kept is None or kept[0] is not prompts or kept[1] != key:
            kept = self._chunks = prompts, key, self._build_chunks(model, prompts, layout, classes)
        return kept[2]

    @torch.compiler.disable
    def _build_chunks(self, model, prompts, layout, classes: range) -> list[PlainRows | PackedRows]:
        path = self._resolved_path(model, prompts, layout)
        num_shared = num_shared_positions(prompts, layout)
        num_chunks = -(-len(classes) // self._chunk_size(len(classes)))
        parts = torch.tensor(classes).tensor_split(num_chunks)
        return [build_rows(path, part, prompts, num_shared, model.text_model) for part in parts]

    def _chunk_size(self, num_classes: int) -> int:
        if self.batch_size == AUTO:
            return CHUNK if num_classes > MANY_CLASSES else num_classes
        return self.batch_size or num_classes

    def _resolved_path(self, model, prompts, layout) -> str:
        if self.path == PLAIN:
            return PLAIN
        fastest = self._fastest_path(model, prompts, layout)
        if self.path != AUTO and PATHS.index(self.path) < PATHS.index(fastest):
            raise ValueError(
                f"path={self.path!r} would not give this model's embeddings; the fastest path that does is "
                f"{fastest!r}. Leave it at {AUTO!r}."
            )
        return fastest if self.path == AUTO else self.path

    def _fastest_path(self, model, prompts, layout) -> str:
        """Tried once for each state of the model, since adapters are switched back and forth."""
        key = what_decides(model, layout)
        path = self._fastest_paths.get(key)
        if path is None:
            if len(self._fastest_paths) >= MOST_STATES:
                self._fastest_paths = {}
            path = self._fastest_paths[key] = fastest_exact_path(model, prompts)
        return path
