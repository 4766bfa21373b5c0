"""Learnable vectors for the image tower and for deeper layers: vision prompts, deep prompts, and MaPLe's coupling."""

from __future__ import annotations

import torch
from torch import nn

from ..towers import entry_of, execution_device
from .base_layer import CLIPPromptLayer
from .layer import RANDOM_STD
from .layout import PromptLayout
from .tensors import empty_linear, empty_vectors


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


class CLIPDeepPrompts(CLIPVectorsLayer):
    """
    Wraps an encoder layer and replaces the hidden states at the positions of the prompts before the layer runs.

    What earlier layers have made of their prompts is dropped. Layers after the last wrapped one do not replace
    anything. In a text tower the positions are `start_idx ... start_idx + n - 1`, in an image tower the last n.

    Args:
        base_layer (`torch.nn.Module`):
            The encoder layer to wrap.
        adapter_name (`str`):
            The name of the first adapter.
        at_end (`bool`):
            Whether the positions are the last n, as in an image tower.

    Source: Jia et al., Visual Prompt Tuning (ECCV 2022), "deep"; MaPLe and IVLP for both towers of CLIP.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, at_end: bool) -> None:
        super().__init__(base_layer, adapter_name)
        self.at_end = at_end

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Calls the encoder layer with the replaced `hidden_states` (B, L, D)."""
        if not self.disable_adapters:
            for name in self._active_here():
                hidden_states = self._replace(hidden_states, name)
        return self.base_layer(hidden_states, *args, **kwargs)

    def _replace(self, states: torch.Tensor, name: str) -> torch.Tensor:
        vectors = self.vectors(name).to(states)  # (n, D)
        n, length = vectors.shape[0], states.shape[1]
        start = length - n if self.at_end else self.prompt_layouts[name].start_idx
        vectors = vectors.expand(states.shape[0], -1, -1)  # (B, n, D)
        return torch.cat([states[:, :start], vectors, states[:, start + n :]], dim=1)


class CLIPVisionLearnableEmbeddings(CLIPVectorsLayer):
    """
    Wraps `CLIPVisionEmbeddings`, or those of a related model, and appends n vectors to class token and patches.

    The vectors get no position embeddings, and come before the pre-LayerNorm that CLIP applies to the result, as in
    MaPLe, IVLP and PromptSRC. VPT for other vision transformers inserts them after the class token, which makes no
    difference for tokens without position.
    """

    # transformers looks for the input embeddings of an image tower, and for its positions, here.
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
