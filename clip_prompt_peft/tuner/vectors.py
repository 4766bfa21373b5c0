"""Learnable vectors for the image tower and for deeper layers: vision prompts, deep prompts, MaPLe's coupling, TCP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from ..towers import PATCH_PROJECTIONS, entry_of, execution_device
from .base_layer import CLIPPromptLayer
from .layer import RANDOM_STD
from .layout import PromptLayout
from .tensors import empty_linear, empty_vectors


PARTS_OF_IMAGE_EMBEDDINGS = ("class_embedding", "position_embedding", "position_embeddings", *PATCH_PROJECTIONS)
CLASS_BOTTLENECK = 4  # TCP, trainers/tcp.py: the hidden width is that of the class embedding // 4


class CLIPVectorsLayer(CLIPPromptLayer):
    """
    The base class of layers with (n, D) vectors for each adapter: its own, or linear maps of those of a text layer.

    **Attributes**:
        - **learnable_prompts** (`nn.ParameterDict`): The vectors (n, D).
        - **learnable_projections** (`nn.ModuleDict`): Linear layers from the width of the text tower to D (MaPLe).
        - **text_sources** (`dict[str, CLIPPromptLayer]`): The layer whose vectors are mapped. A plain dictionary, so
          that the layer does not become a submodule of two modules.
    """

    adapter_layer_names = ("learnable_prompts", "learnable_projections")
    other_param_names = (*CLIPPromptLayer.other_param_names, "text_sources")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_prompts = nn.ParameterDict({})
        self.learnable_projections = nn.ModuleDict({})
        self.text_sources: dict[str, CLIPPromptLayer] = {}

    def update_layer(
        self, adapter_name: str, layout: PromptLayout, n: int, like: torch.Tensor, text_width: int | None = None
    ) -> None:
        """Adds the tensors of an adapter, not initialized. An older adapter of that name is replaced.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            layout (`PromptLayout`):
                Its layout.
            n (`int`):
                The number of vectors.
            like (`torch.Tensor`):
                A tensor (..., D) of the tower, which gives the width, device and dtype.
            text_width (`int`, *optional*):
                The width of the text vectors, if the vectors here are maps of them. The layer that they come from has
                to be entered in `text_sources`.
        """
        self._begin(adapter_name, layout)
        self.in_features = self.out_features = like.shape[-1]
        if text_width is None:
            self.learnable_prompts[adapter_name] = nn.Parameter(empty_vectors((n, like.shape[-1]), like))
        else:
            self.learnable_projections[adapter_name] = empty_linear(text_width, like.shape[-1], like)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, config) -> None:
        """Initializes the tensors of an adapter at random."""
        if adapter_name in self.learnable_prompts:
            self.learnable_prompts[adapter_name].normal_(std=RANDOM_STD)
        else:
            self.learnable_projections[adapter_name].reset_parameters()

    def vectors(self, adapter_name: str) -> torch.Tensor:
        """Returns the vectors (n, D) of an adapter, differentiably."""
        self._check_weights(adapter_name)
        if adapter_name not in self.learnable_projections:
            return entry_of(self.learnable_prompts, adapter_name)
        projection = self.learnable_projections[adapter_name]
        text = self.text_sources[adapter_name].vectors(adapter_name)  # (n, D_text)
        return projection(text.to(execution_device(projection), projection.weight.dtype))


@dataclass(frozen=True)
class PerClass:
    """
    The vectors of the classes whose texts a call of the text model holds.

    Attributes:
        vectors: (K, n, D), the vectors of each class.
        index: (K, n), their places in the flattened tokens of the batch; `None` if text k is that of class k.
    """

    vectors: torch.Tensor
    index: torch.LongTensor | None = None


# By id of the layer, as for the vectors of each text.
_PER_CLASS: ContextVar[dict[int, PerClass] | None] = ContextVar("per_class", default=None)


class CLIPDeepPrompts(CLIPVectorsLayer):
    """
    Wraps an encoder layer and replaces the hidden states at the positions of the prompts before the layer runs.

    What earlier layers have made of their prompts is dropped. Layers after the last wrapped one do not replace
    anything. In a text tower the positions are `start_idx ... start_idx + n - 1`, in an image tower the last n.

    At the `class_aware_layer` of an adapter, the vectors differ between classes: a network of two linear layers makes
    them of the zero-shot class embeddings. The layer cannot know the class of a text, so they are passed by
    [`per_class`] around a call of the text model, or to `forward`.

    Args:
        base_layer (`torch.nn.Module`):
            The encoder layer to wrap.
        adapter_name (`str`):
            The name of the first adapter.
        at_end (`bool`):
            Whether the positions are the last n, as in an image tower.

    **Attributes**:
        - **learnable_class_in**, **learnable_class_out** (`nn.ModuleDict`): The two linear layers from a zero-shot
          class embedding (E,) to its vectors (n, D), of adapters with this layer as `class_aware_layer`.

    Source: Jia et al., Visual Prompt Tuning (ECCV 2022), "deep"; MaPLe and IVLP for both towers of CLIP; Yao et al.,
    TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model (CVPR 2024), for vectors of the classes.
    """

    adapter_layer_names = (*CLIPVectorsLayer.adapter_layer_names, "learnable_class_in", "learnable_class_out")

    def __init__(self, base_layer: nn.Module, adapter_name: str, at_end: bool) -> None:
        super().__init__(base_layer, adapter_name)
        self.at_end = at_end
        self.learnable_class_in, self.learnable_class_out = nn.ModuleDict({}), nn.ModuleDict({})

    def update_layer(
        self,
        adapter_name: str,
        layout: PromptLayout,
        n: int,
        like: torch.Tensor,
        text_width: int | None = None,
        class_width: int | None = None,
    ) -> None:
        """As in the base class. `class_width` is E, the width of class embeddings, for vectors that are made of them.

        Raises:
            ValueError: If class embeddings are too narrow for the network.
        """
        if class_width is None:
            super().update_layer(adapter_name, layout, n, like, text_width)
            return
        hidden, width = class_width // CLASS_BOTTLENECK, like.shape[-1]
        if hidden < 1:
            raise ValueError(
                f"class_aware_layer needs class embeddings of at least {CLASS_BOTTLENECK} dimensions (the hidden "
                f"layer has a quarter of them); this model's have {class_width}."
            )
        self._begin(adapter_name, layout)
        self.in_features = self.out_features = width
        self.learnable_class_in[adapter_name] = empty_linear(class_width, hidden, like)
        self.learnable_class_out[adapter_name] = empty_linear(hidden, n * width, like)

    def reset_adapter_parameters(self, adapter_name: str, config) -> None:
        """Initializes the tensors of an adapter at random."""
        if adapter_name not in self.learnable_class_in:
            super().reset_adapter_parameters(adapter_name, config)
            return
        for network in (self.learnable_class_in, self.learnable_class_out):
            network[adapter_name].reset_parameters()

    @property
    def class_aware_adapter(self) -> str | None:
        """The active adapter that replaces states by vectors of the classes here, `None` without one."""
        if self.disable_adapters:
            return None
        return next((name for name in self._active_here() if name in self.learnable_class_in), None)

    def class_vectors(self, class_priors: torch.Tensor) -> torch.Tensor:
        """Returns the vectors (K, n, D) of classes by their zero-shot embeddings (K, E), differentiably."""
        name = self.class_aware_adapter
        self._check_weights(name)
        first, second = self.learnable_class_in[name], self.learnable_class_out[name]
        inputs = class_priors.to(execution_device(first), first.weight.dtype)
        hidden = first(inputs)
        vectors = second(hidden * torch.sigmoid(1.702 * hidden))  # (K, n D), by the authors' GELU
        return vectors.view(len(class_priors), self.prompt_layouts[name].num_virtual_tokens, -1)

    @contextmanager
    def per_class(self, vectors: torch.Tensor) -> Iterator[None]:
        """Gives the K texts of a call of the text model the vectors (K, n, D) of their classes."""
        token = _PER_CLASS.set({**(_PER_CLASS.get() or {}), id(self): PerClass(vectors)})
        try:
            yield
        finally:
            _PER_CLASS.reset(token)

    def forward(self, hidden_states: torch.Tensor, *args, per_class: PerClass | None = None, **kwargs):
        """Calls the encoder layer with the replaced `hidden_states` (B, L, D).

        Raises:
            ValueError: If vectors of the classes are needed and were not given.
        """
        if not self.disable_adapters:
            for name in self._active_here():
                if name in self.learnable_class_in:
                    hidden_states = self._replace_by_class(hidden_states, name, per_class)
                else:
                    hidden_states = self._replace(hidden_states, self.vectors(name), name)
        return self.base_layer(hidden_states, *args, **kwargs)

    def _replace(self, states: torch.Tensor, vectors: torch.Tensor, name: str) -> torch.Tensor:
        """Puts vectors, (n, D) or (B, n, D), in place of the states at the positions of the prompts."""
        n, length = vectors.shape[-2], states.shape[1]
        start = length - n if self.at_end else self.prompt_layouts[name].start_idx
        vectors = vectors.to(states).expand(states.shape[0], -1, -1)  # (B, n, D)
        return torch.cat([states[:, :start], vectors, states[:, start + n :]], dim=1)

    def _replace_by_class(self, states: torch.Tensor, name: str, per_class: PerClass | None) -> torch.Tensor:
        per_class = per_class or (_PER_CLASS.get() or {}).get(id(self))
        if per_class is None:
            layout = self.prompt_layouts[name]
            raise ValueError(
                f"A text alone does not tell adapter {name!r} what to put in, because {layout.merge_obstacle}. "
                "Classify with CLIPForPromptClassification, whose get_class_embeds and forward know the classes."
            )
        if per_class.index is None:
            return self._replace(states, per_class.vectors, name)
        flat, places = states.reshape(-1, states.shape[-1]), per_class.index.flatten()
        vectors = per_class.vectors.reshape(-1, states.shape[-1]).to(states)
        return flat.index_copy(0, places, vectors).view(states.shape)


class CLIPVisionLearnableEmbeddings(CLIPVectorsLayer):
    """
    Wraps `CLIPVisionEmbeddings`, or those of a related model, and appends n vectors to class token and patches.

    The vectors get no position embeddings, and come before the pre-LayerNorm that CLIP applies to the result, as in
    MaPLe, IVLP and PromptSRC. VPT for other vision transformers inserts them after the class token, which makes no
    difference for tokens without position.
    """

    # transformers looks for the input embeddings of an image tower, and for its positions, here.
    def __getattr__(self, name: str):
        if name in PARTS_OF_IMAGE_EMBEDDINGS:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor`: (B, 1 + patches + n, D), or one less without a class token.

        Raises:
            ValueError: If several active adapters have vision prompts.
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
