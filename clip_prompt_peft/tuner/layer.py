"""The text embeddings of CLIP with learnable vectors in place of some token embeddings."""

from __future__ import annotations

import warnings

import torch
from peft import PromptTuningInit
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..class_prompts import PromptLayout
from .config import CLIPPromptTuningConfig


RANDOM_STD = 0.02  # CoOp, trainers/coop.py


def is_clip_text_embeddings(module: nn.Module) -> bool:
    """Whether `module` looks like CLIP's text embeddings: one token table plus one position table.

    Told by structure, since the path and the class differ between transformers versions and members of the family.
    """
    return isinstance(module, CLIPTextLearnableEmbeddings) or all(
        isinstance(getattr(module, name, None), nn.Embedding) for name in ("token_embedding", "position_embedding")
    )


class CLIPTextLearnableEmbeddings(nn.Module, BaseTunerLayer):
    """
    Wraps `CLIPTextEmbeddings`: token embeddings at `start_idx ... start_idx + n - 1` become learnable vectors.

    Position embeddings are added by the wrapped module, unchanged. The wrapped tables are neither copied nor trained.
    Several adapters may be held; those that are active at the same time must replace different positions.

    Args:
        base_layer: the text embeddings to wrap.
        adapter_name: name of the first adapter.
        config: its configuration, resolved (`replaced_token_ids` filled in).

    **Attributes**:
        - **learnable_embeddings** (`nn.ParameterDict`): (n, D) for each adapter.
    """

    adapter_layer_names = ("learnable_embeddings",)
    other_param_names = ("prompt_configs", "_placeholders")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: CLIPPromptTuningConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.learnable_embeddings = nn.ParameterDict({})
        self.prompt_configs: dict[str, CLIPPromptTuningConfig] = {}
        self._placeholders: dict[str, nn.Parameter] = {}  # of adapters whose weights have not been loaded yet
        self.merged_adapters = []
        self._unmerged_rows: list[tuple[int, torch.Tensor]] = []  # (first position, rows) in the order of merging
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # The wrapped module's own parts stay reachable (and replaceable) where transformers looks for them.
    @property
    def token_embedding(self) -> nn.Embedding:
        return self.get_base_layer().token_embedding

    @property
    def position_embedding(self) -> nn.Embedding:
        return self.get_base_layer().position_embedding

    @property
    def position_ids(self) -> torch.Tensor:
        return self.get_base_layer().position_ids

    @property
    def weight(self) -> torch.Tensor:
        return self.token_embedding.weight

    def __setattr__(self, name, value):
        if name in ("token_embedding", "position_embedding", "position_ids"):
            setattr(self.get_base_layer(), name, value)
        else:
            super().__setattr__(name, value)

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of the adapter in effect, merged ones included; `None` when disabled or without one."""
        names = [] if self.disable_adapters else self.merged_adapters or self._active_here()
        if not names:
            return None
        layouts = [self.prompt_configs[name] for name in names]
        if len({layout.padded_template for layout in layouts}) > 1:
            raise ValueError(
                f"The active adapters {names} have different templates "
                f"({', '.join(repr(layout.padded_template) for layout in layouts)}); activate one of them only."
            )
        return layouts[0]

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.learnable_embeddings]

    def update_layer(self, adapter_name: str, config: CLIPPromptTuningConfig) -> None:
        """Adds an adapter, or starts one of that name anew."""
        self.prompt_configs[adapter_name] = config
        self.learnable_embeddings[adapter_name] = nn.Parameter(self._initial_values(config))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._placeholders.pop(adapter_name, None)
        if config._loaded:
            self._placeholders[adapter_name] = self.learnable_embeddings[adapter_name]

    def _vectors(self, name: str) -> nn.Parameter:
        """(n, D). Raises `ValueError` if they were to be loaded and were not: transformers' `load_adapter` only warns
        when a file lacks them."""
        vectors = self.learnable_embeddings[name]
        if self._placeholders.get(name) is vectors:
            raise ValueError(
                f"The configuration of adapter {name!r} belongs to saved weights, but none were loaded: the file is "
                "damaged, belongs to another model, or has the text tower at another path (then "
                "PeftModel.from_pretrained finds it). To start a new adapter, make a CLIPPromptTuningConfig without "
                "replaced_token_ids."
            )
        return vectors

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self._placeholders):
            if f"{prefix}learnable_embeddings.{name}" in state_dict:
                del self._placeholders[name]

    @torch.no_grad()
    def _initial_values(self, config: CLIPPromptTuningConfig) -> torch.Tensor:
        """(n, D), in float32 at least: half precision is too coarse for the steps of an optimizer."""
        table = self.token_embedding.weight  # (V, D)
        dtype = torch.promote_types(table.dtype, torch.float32)
        shape = (config.num_virtual_tokens, table.shape[1])
        if config._loaded:  # values are about to come: draw nothing from the random number generator
            return table[torch.tensor(config.replaced_token_ids, device=table.device)].to(dtype)
        if config.prompt_tuning_init is PromptTuningInit.RANDOM:
            return torch.empty(shape, dtype=dtype, device=table.device).normal_(std=RANDOM_STD)
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(table.shape[0], shape[:1], device=table.device)
        else:
            ids = torch.tensor(config.init_token_ids, device=table.device)
        return table[ids].to(dtype)

    def _get_base_layer_device_and_dtype(self, base_layer):
        # Without a dtype peft moves the vectors to the device and leaves them in float32.
        return self.weight.device, None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: (B, L) token ids, begin token first.
            position_ids: (1 or B, L), by default 0 ... L - 1.
            inputs_embeds: (B, L, D) instead of `input_ids`; replaced at the same positions.

        Returns:
            (B, L, D) token plus position embeddings.

        Raises:
            ValueError: if the texts end before, or with, the replaced positions, or the positions of two active
                adapters overlap.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._active_here()
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        self._check_overlap(adapters)
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)  # (B, L, D)
        for name in adapters:
            inputs_embeds = self._replace(inputs_embeds, name)
        return self.base_layer(position_ids=position_ids, inputs_embeds=inputs_embeds)

    def _replace(self, inputs_embeds: torch.Tensor, name: str) -> torch.Tensor:
        vectors = self._vectors(name)  # (n, D)
        start, end = self._span(name)
        if inputs_embeds.shape[1] <= end:
            raise ValueError(
                f"Adapter {name!r} replaces positions {start} ... {end - 1} and needs an end token after them, but "
                f"the texts have only {inputs_embeds.shape[1]} tokens. Write the texts with the adapter's template "
                f"{self.prompt_configs[name].padded_template!r}."
            )
        vectors = vectors.to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], -1, -1)  # (B, n, D)
        return torch.cat([inputs_embeds[:, :start], vectors, inputs_embeds[:, end:]], dim=1)

    def _span(self, name: str) -> tuple[int, int]:
        config = self.prompt_configs[name]
        return config.start_idx, config.start_idx + config.num_virtual_tokens

    def _check_overlap(self, names: list[str]) -> None:
        spans = sorted((*self._span(name), name) for name in names)
        for (_, end, left), (start, _, right) in zip(spans, spans[1:]):
            if start < end:
                raise ValueError(
                    f"Adapters {left!r} and {right!r} both replace position {start}; make only one of them active, or "
                    "give them separate positions by start_idx and num_virtual_tokens."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds the vectors into the position table: `pos[start + i] += v[i] - token_table[replaced_token_ids[i]]`.

        Exact for texts that carry the replaced tokens at the replaced positions, as all that are written with the
        adapter's template do. Other texts are changed in a meaningless way.

        Args:
            safe_merge: check the results for NaN and Inf before any row is changed.
            adapter_names: adapters to merge; by default the active ones.

        Raises:
            ValueError: if two adapters replace the same position, or `safe_merge` finds something.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if name in self.learnable_embeddings]
        self._check_overlap(self.merged_adapters + adapter_names)
        table = self.position_embedding.weight.data  # (positions, D)
        folded = {name: self._folded_rows(name, table[slice(*self._span(name))]) for name in adapter_names}
        broken = [name for name, rows in folded.items() if safe_merge and not torch.isfinite(rows).all()]
        if broken:
            raise ValueError(f"NaN or Inf in the merged rows; the adapter {broken[0]!r} seems to be broken.")
        for name, rows in folded.items():
            start, end = self._span(name)
            self._unmerged_rows.append((start, table[start:end].clone()))
            table[start:end] = rows
            self.merged_adapters.append(name)

    def _folded_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        vectors = self._vectors(name).data  # (n, D)
        ids = torch.tensor(self.prompt_configs[name].replaced_token_ids, device=rows.device)
        # in the vectors' precision, so that a half-precision table is rounded once
        return (rows.to(vectors) + vectors - self.weight.data[ids].to(vectors)).to(rows.dtype)

    def unmerge(self) -> None:
        """Puts the saved rows of the position table back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            start, rows = self._unmerged_rows.pop()
            table = self.position_embedding.weight.data
            table[start : start + len(rows)] = rows.to(table)

    def __repr__(self) -> str:
        return "clip_prompt_tuning." + super().__repr__()
