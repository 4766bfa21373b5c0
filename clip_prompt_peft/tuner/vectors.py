"""Vectors of their own, or linear maps of text vectors (MaPLe)."""

from __future__ import annotations

import torch
from torch import nn

from .config import CLIPPromptTuningConfig
from .meta_net import build_linear
from .prompt_layer import CLIPPromptLayer, random_vectors


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
