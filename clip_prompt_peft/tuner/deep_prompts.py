"""Fresh vectors in front of the deeper encoder layers."""

from __future__ import annotations

import torch
from torch import nn

from .coupling import CLIPVectorsLayer


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
