"""Vectors of their own, or linear maps of text vectors (MaPLe)."""

from __future__ import annotations

import torch
from torch import nn

from .config import CLIPPromptTuningConfig
from .layer import CLIPPromptLayer, build_linear, random_vectors


class CLIPVectorsLayer(CLIPPromptLayer):
    """
    A layer with (n, D) vectors for each adapter: its own, or, where it is coupled, maps of those of a text layer.

    **Attributes**:
        - **learnable_prompts** (`nn.ParameterDict`): (n, D).
        - **learnable_projections** (`nn.ModuleDict`): linear, from the text width to D.
        - **text_sources** (`dict[str, CLIPPromptLayer]`): the layer whose vectors are mapped. In a plain dictionary,
          so that it is not a submodule of two modules.
    """

    adapter_layer_names = ("learnable_prompts", "learnable_projections")
    other_param_names = (*CLIPPromptLayer.other_param_names, "text_sources")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_prompts = nn.ParameterDict({})
        self.learnable_projections = nn.ModuleDict({})
        self.text_sources: dict[str, CLIPPromptLayer] = {}

    def update_layer(self, adapter_name: str, config: CLIPPromptTuningConfig, n: int, like: torch.Tensor) -> None:
        """Adds an adapter with vectors of its own, or starts one of that name anew.

        Args:
            n: number of vectors.
            like: a tensor of the tower (..., D), for width, device and dtype.
        """
        with self._starting(adapter_name, config):
            vectors = random_vectors((n, like.shape[-1]), like, draw=not config._loaded)
            self.learnable_prompts[adapter_name] = nn.Parameter(vectors)

    def couple(self, adapter_name: str, config: CLIPPromptTuningConfig, width: int, like: torch.Tensor) -> None:
        """Adds an adapter whose vectors are maps of text vectors, or starts one of that name anew.

        Which layer these come from is to be entered in `text_sources`.

        Args:
            width: of the text vectors.
            like: a tensor of this tower (..., D).
        """
        with self._starting(adapter_name, config):
            projection = build_linear(width, like.shape[-1], like, draw=not config._loaded)
            self.learnable_projections[adapter_name] = projection

    def vectors(self, adapter_name: str) -> torch.Tensor:
        """(n, D)"""
        self._check_weights(adapter_name)
        if adapter_name not in self.learnable_projections:
            return self.learnable_prompts[adapter_name]
        projection = self.learnable_projections[adapter_name]
        text = self.text_sources[adapter_name].vectors(adapter_name)  # (n, D_text)
        return projection(text.to(projection.weight))


class CLIPDeepPrompts(CLIPVectorsLayer):
    """
    Wraps an encoder layer: the states at the prompts' places are replaced by vectors before the layer runs.

    What the layers before made of their own prompts is dropped; layers behind the last wrapped one carry on what they
    get. In a text tower the places are `start_idx ... start_idx + n - 1`, in an image tower the last n.

    Args:
        base_layer: the encoder layer to wrap.
        adapter_name: name of the first adapter.
        at_end: whether the places are the last n, as in an image tower.

    Source: Jia et al., Visual Prompt Tuning (ECCV 2022), "deep"; MaPLe and IVLP for both towers of CLIP.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, at_end: bool) -> None:
        super().__init__(base_layer, adapter_name)
        self.at_end = at_end

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """As the encoder layer's; `hidden_states` is (B, L, D)."""
        if not self.disable_adapters:
            for name in self._active_here():
                hidden_states = self._replace(hidden_states, name)
        return self.base_layer(hidden_states, *args, **kwargs)

    def _replace(self, states: torch.Tensor, name: str) -> torch.Tensor:
        vectors = self.vectors(name).to(states)  # (n, D)
        n, length = vectors.shape[0], states.shape[1]
        start = length - n if self.at_end else self.prompt_configs[name].start_idx
        vectors = vectors.expand(states.shape[0], -1, -1)  # (B, n, D)
        return torch.cat([states[:, :start], vectors, states[:, start + n :]], dim=1)


class CLIPVisionLearnableEmbeddings(CLIPVectorsLayer):
    """
    Wraps `CLIPVisionEmbeddings` or those of another family: n vectors are appended to class token and patches.

    They come after the position embeddings have been added and get none of their own, and before the pre-LayerNorm,
    which CLIP applies to the result (MaPLe, IVLP and PromptSRC; VPT for other vision transformers puts them after the
    class token, which for tokens without position makes no difference).
    """

    # Where transformers looks for the input embeddings of an image tower, and for its positions.
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
            (B, 1 + patches + n, D), or one less without a class token

        Raises:
            ValueError: if more than one active adapter has vision prompts.
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
