"""The class encoder, which the classifier calls to turn its prompts into class embeddings."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from ..towers import execution_device, text_embeddings_of, text_side, trainable_parameters
from ..tuner.layout import PromptLayout
from .cache import ClassEmbedsMemo, Memo, WeightsState
from .casts import keep_casts
from .chunks import (
    autocast_state,
    encode_by_images,
    encode_in_chunks,
    gather_shares,
    num_processes,
    share_of_classes,
)
from .class_aware import ClassAwarePrompts, class_aware_places, fewest_shared_positions, pack_class_aware
from .graph import AUTO, GraphedEncoder, Plan
from .memory import CHUNK, MANY_CLASSES, PROMPTS_AT_ONCE, TowerSize, bytes_of_class, classes_that_fit, free_bytes
from .packing import (
    PACKED,
    PATHS,
    PLAIN,
    PackedPrompts,
    PlainPrompts,
    attention_of,
    build_chunk,
    exact_path,
    num_shared_positions,
    tokens_of_class,
)
from .prompts import ClassPrompts


Chunk = PlainPrompts | PackedPrompts | ClassAwarePrompts


class ClassEncoder:
    """
    Encodes the class prompts of a CLIP exactly, and only as expensively as needed.

    In evaluation (in eval mode, and if no gradient is needed) the result is kept until something changes that it
    depends on. Results for several adapters, or lists of classes, are kept beside each other.

    Args:
        path (`str`, *optional*, defaults to `"auto"`):
            `"plain"` runs every prompt at full length, as CoOp does. `"cut"` ends all sequences after the longest
            prompt. `"packed"` computes the shared prefix of the prompts once. `"auto"` takes the fastest path that is
            exact for the model.
        batch_size (`int`, *optional*, defaults to `"auto"`):
            The number of classes at a time. In training, all chunks but one are computed a second time for their
            gradient, so that memory does not grow with the number of classes. `None` takes all classes at once.
            `"auto"` takes as many as fit comfortably into the free memory of a GPU, by default all. On a CPU it takes
            up to 256 classes at once, and 128 at a time if there are more. So it does on a GPU of several processes
            whose text tower may be sharded between them, since these have to make the same number of calls.
        across_processes (`bool`, *optional*, defaults to `"auto"`):
            Whether each process of a distributed training encodes only its share of the classes. `True` does so in
            every call, also in evaluation, so that all processes have to make the same calls. `"auto"` does so only in
            training with more than 256 classes. Gradients have to be averaged over the processes, as
            DistributedDataParallel does. It has to be `False` if processes can have different numbers of batches
            (`join_uneven_inputs`): the others would wait for a process that has no more.
        cuda_graph (`bool` or `str`, *optional*, defaults to `False`):
            Whether, in training on a CUDA device, forward and backward pass are captured once as CUDA graphs and
            replayed in every step, which takes the launches of their kernels off the host. It is off by default,
            since it has not been run on a card yet. Values and gradients are those of the ordinary way. The memory of
            one step is kept from step to step. Where a capture is not possible (dropout, gradient checkpointing,
            hooks, several chunks of classes or shares of processes, vectors that depend on the image, too little
            memory, `torch.compile`, ...), the ordinary way is taken: with `"auto"` a debug message says why, with
            `True` a warning does.
    """

    def __init__(
        self,
        path: str = AUTO,
        batch_size: int | str | None = AUTO,
        across_processes: bool | str = AUTO,
        cuda_graph: bool | str = False,
    ):
        self.path = path
        self.batch_size = batch_size
        self.across_processes = across_processes
        self.cuda_graph = cuda_graph
        self._graphs = GraphedEncoder()
        self._embeds = ClassEmbedsMemo()
        self._chunks = Memo()

    def __getstate__(self) -> dict:
        # Copies and pickles start without kept results and graphs.
        return {name: getattr(self, name) for name in ("path", "batch_size", "across_processes", "cuda_graph")}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __call__(
        self,
        model: CLIPModel,
        prompts: ClassPrompts,
        layout: PromptLayout | None = None,
        image_embeds: torch.Tensor | None = None,
        class_priors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            model (`CLIPModel`):
                A model with a text tower.
            prompts (`ClassPrompts`):
                The prompts of C classes.
            layout (`PromptLayout`, *optional*):
                The layout of the active prompt adapter.
            image_embeds (`torch.Tensor`, *optional*):
                (B, E), L2-normalized, for an adapter that is conditioned on the image.
            class_priors (`torch.Tensor`, *optional*):
                (C, E), the zero-shot embeddings of the classes over `layout.class_prior_templates`, for an adapter
                with a `class_aware_layer`.

        Returns:
            `torch.Tensor`: Class embeddings (C, E), L2-normalized, in at least float32, differentiable with respect to
            everything in the text tower that requires a gradient. They must not be changed in place. With
            `image_embeds`, (B, C, E), which are neither kept nor shared between processes.

        Raises:
            ValueError: If a setting is unknown, or not exact for this model.
        """
        self._check_settings()
        if image_embeds is not None:
            if self._wants_graph(model):
                self._graphs.tell("every image has class embeddings of its own", self.cuda_graph)
            return self._encode_for_images(model, prompts, layout, image_embeds)
        if torch.compiler.is_compiling():  # the state of the model cannot be compared in a compiled graph
            return self._encode(model, prompts, layout, class_priors)
        if model.training or (torch.is_grad_enabled() and trainable_parameters(text_side(model))):
            self._embeds.clear()
            if not self.cuda_graph:
                self._graphs.clear()
            embeds = self._replay(model, prompts, layout, class_priors) if self._wants_graph(model) else None
            return self._encode(model, prompts, layout, class_priors) if embeds is None else embeds
        device = execution_device(model.text_model)
        self._graphs.clear_elsewhere(device)
        priors_of = layout and layout.class_prior_templates
        settings = attention_of(model.text_model), autocast_state(device), priors_of
        return self._embeds.get(
            (WeightsState(text_side(model)), prompts, settings),
            lambda: self._encode(model, prompts, layout, class_priors),
        )

    def clear(self) -> None:
        """Drops the kept embeddings, and the captured graph with its memory.

        It is only needed to free memory, and after a write to a large frozen weight through its `.data`.
        """
        self._embeds.clear()
        self._graphs.clear()

    def prepare(
        self, model: CLIPModel, prompts: ClassPrompts, layout: PromptLayout | None = None
    ) -> tuple[list[Chunk], int]:
        """Makes the inputs of the text tower in advance, as for a trace that cannot make them.

        Returns:
            The chunks of classes, and how many prompts to encode at once if every image has its own.
        """
        self._check_settings()
        return self._chunks_of(model, prompts, layout, range(len(prompts.texts)))

    def _check_settings(self) -> None:
        if self.path not in (AUTO, *PATHS):
            raise ValueError(f"path must be {AUTO!r} or one of {', '.join(map(repr, PATHS))}, got {self.path!r}.")
        size = self.batch_size
        if size not in (AUTO, None) and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"batch_size must be a positive integer, None or {AUTO!r}, got {size!r}.")
        if self.across_processes not in (AUTO, True, False):
            raise ValueError(f"across_processes must be True, False or {AUTO!r}, got {self.across_processes!r}.")
        if self.cuda_graph not in (AUTO, True, False):
            raise ValueError(f"cuda_graph must be True, False or {AUTO!r}, got {self.cuda_graph!r}.")

    def _wants_graph(self, model) -> bool:
        if not self.cuda_graph or torch.compiler.is_compiling():
            return False
        return model.training and torch.is_grad_enabled()

    def _replay(self, model, prompts, layout, class_priors) -> torch.Tensor | None:
        """Returns what `_encode` would from a captured graph, or `None` where there is none."""

        def make_plan() -> Plan:
            is_shared = self._is_shared(model, len(prompts.texts))
            classes = share_of_classes(len(prompts.texts)) if is_shared else range(len(prompts.texts))
            chunks, _ = self._chunks_of(model, prompts, layout, classes)
            tokens = tokens_of_class(self._resolved_path(model), prompts, fewest_shared_positions(prompts, layout))
            needed_bytes = len(classes) * bytes_of_class(*tokens, self._tower_size(model), with_gradients=True)
            first = chunks[0]
            return Plan(
                lambda model: first.encode(model, layout, class_priors=class_priors)[0],
                len(chunks),
                is_shared,
                int(needed_bytes),
            )

        settings = self.path, self.batch_size, self.across_processes, num_processes()
        tensors = () if class_priors is None else (class_priors,)
        return self._graphs.encode(model, (prompts, layout, settings), tensors, make_plan, self.cuda_graph)

    def _encode(self, model, prompts, layout, class_priors=None) -> torch.Tensor:
        num_classes = len(prompts.texts)
        is_shared = self._is_shared(model, num_classes)
        classes = share_of_classes(num_classes) if is_shared else range(num_classes)
        chunks, _ = self._chunks_of(model, prompts, layout, classes)

        def encode(chunk: Chunk) -> torch.Tensor:
            return chunk.encode(model, layout, class_priors=class_priors)[0]

        if len(chunks) == 1:
            embeds = encode(chunks[0])
        else:
            parts = text_side(model)
            embeds = encode_in_chunks(keep_casts(encode, parts), chunks, trainable_parameters(parts))
        return gather_shares(embeds, num_classes) if is_shared else embeds

    def _encode_for_images(self, model, prompts, layout, image_embeds) -> torch.Tensor:
        vectors = text_embeddings_of(model.text_model).per_text_vectors(image_embeds)  # (B, n, D)
        chunks, at_once = self._chunks_of(model, prompts, layout, range(len(prompts.texts)))
        pairs = [(chunk, vectors.split(max(1, at_once // len(chunk.classes)))) for chunk in chunks]
        encode = keep_casts(lambda chunk, part: chunk.encode(model, layout, part), text_side(model))
        return encode_by_images(encode, pairs)  # (B, C, E)

    def _is_shared(self, model, num_classes: int) -> bool:
        if num_processes() == 1 or num_classes < num_processes():
            return False
        if self.across_processes != AUTO:
            return self.across_processes
        is_trained = model.training and torch.is_grad_enabled() and bool(trainable_parameters(text_side(model)))
        return is_trained and num_classes > MANY_CLASSES

    def _chunks_of(self, model, prompts, layout, classes: range) -> tuple[list[Chunk], int]:
        """Returns the inputs of the text tower, and how many prompts to take at once if every image has its own.

        They are kept from call to call: only prompts and settings change them.
        """
        at_most = None if layout is None else layout.num_shared_positions
        attention = attention_of(model.text_model)
        # Bounds instead of the range: once their number varies, a compiled graph compares integers, but no ranges.
        bounds = (classes.start, classes.stop)
        settings = (self.path, self.batch_size, bounds, at_most, class_aware_places(layout))
        settings = (*settings, model.text_model.device, attention)
        if torch.compiler.is_compiling() and self._chunks.latest is not None:
            # A graph without breaks can neither look at all modules of the tower nor compare prompts by value.
            (kept_prompts, kept_settings, *_), chunks = self._chunks.latest
            if kept_prompts is prompts and kept_settings == settings:
                return chunks
        return self._kept_chunks(model, prompts, layout, classes, settings)

    @torch.compiler.disable
    def _kept_chunks(self, model, prompts, layout, classes, settings):
        path, device = self._resolved_path(model), execution_device(model.text_model)
        size = self._size_to_fit(model, path)

        def build() -> tuple[list[Chunk], int]:
            num_shared = num_shared_positions(prompts, layout)
            fitting = None
            if size is not None and (free := free_bytes(device)) is not None:
                tokens = tokens_of_class(path, prompts, fewest_shared_positions(prompts, layout))
                fitting = classes_that_fit(*tokens, size, free)
            num_chunks = -(-len(classes) // self._chunk_size(len(classes), fitting))
            parts = torch.tensor(classes).tensor_split(num_chunks)
            if path == PACKED and class_aware_places(layout) is not None:
                chunks = [pack_class_aware(part, prompts, num_shared, layout, device) for part in parts]
            else:
                chunks = [build_chunk(path, part, prompts, num_shared, device) for part in parts]
            return chunks, PROMPTS_AT_ONCE if fitting is None else fitting

        return self._chunks.get((prompts, settings, path, size), build)

    def _size_to_fit(self, model, path: str) -> TowerSize | None:
        """Returns the size of the tower if chunks are chosen by the memory of the device, otherwise `None`."""
        if self.batch_size != AUTO or execution_device(model.text_model).type == "cpu":
            return None
        # Processes that shard a tower (FSDP, DeepSpeed, ...) exchange weights in every chunk, so all of them need the
        # same number of chunks, and their free memory differs. Such a tower is run along the plain path.
        if path == PLAIN and num_processes() > 1:
            return None
        return self._tower_size(model)

    def _tower_size(self, model) -> TowerSize:
        vectors = {id(tensor) for tensor in text_embeddings_of(model.text_model).parameters()}
        is_trained = any(id(tensor) not in vectors for tensor in trainable_parameters(text_side(model)))
        return TowerSize.of(model, is_trained)

    def _chunk_size(self, num_classes: int, fitting: int | None) -> int:
        if self.batch_size != AUTO:
            return self.batch_size or num_classes
        if fitting is not None:
            return min(num_classes, fitting)
        return CHUNK if num_classes > MANY_CLASSES else num_classes

    def _resolved_path(self, model) -> str:
        if self.path == PLAIN:
            return PLAIN
        fastest = exact_path(model)
        if self.path == AUTO:
            return fastest
        if PATHS.index(self.path) < PATHS.index(fastest):
            raise ValueError(
                f"path={self.path!r} would not give this model's embeddings, as far as is known; the fastest path "
                f"that does is {fastest!r}. Leave it at {AUTO!r}."
            )
        return self.path
