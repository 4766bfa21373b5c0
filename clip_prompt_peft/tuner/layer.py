"""The layer that holds learnable vectors of the text: the text embeddings of a CLIP or a related model."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from accelerate.utils import has_offloaded_params
from peft import PromptTuningInit
from torch import nn

from ..towers import (
    entry_of,
    execution_device,
    first_position_row,
    like_table,
    num_rows,
    position_table_name,
    token_table_name,
)
from .base_layer import CLIPPromptLayer, LabelingLayer
from .config import CLIPPromptTuningConfig
from .layout import PromptLayout
from .tensors import empty_linear, empty_vectors
from .token_ids import check_token_ids, record_token_ids


RANDOM_STD = 0.02  # of randomly initialized vectors, in CoOp, MaPLe, IVLP and PromptSRC alike
BOTTLENECK = 16  # CoCoOp, trainers/cocoop.py: the hidden width is that of the image embedding // 16
TABLE_NAMES = ("token_embedding", "word_embeddings", "position_embedding", "position_embeddings", "position_ids")


@dataclass(frozen=True)
class PerText:
    """
    The vectors and positions of the texts of one call, where they differ between texts.

    Attributes:
        vectors: (R, n, D), the vectors of each of the R texts, or `None` for the same vectors in all texts.
        positions: (R, n), the positions of the vectors, or `None` for `start_idx ... start_idx + n - 1`.
    """

    vectors: torch.Tensor | None = None
    positions: torch.LongTensor | None = None


# By id of the layer. A context variable, so that threads that share a model do not see each other's values.
_PER_TEXT: ContextVar[dict[int, PerText] | None] = ContextVar("per_text", default=None)


class CLIPTextLearnableEmbeddings(LabelingLayer, CLIPPromptLayer):
    """
    Wraps `CLIPTextEmbeddings`, or those of a related model, and replaces token embeddings by learnable vectors.

    The vectors stand at positions `start_idx ... start_idx + n - 1`. The wrapped module adds the position embeddings,
    unchanged; its tables are neither copied nor trained. Several adapters can be active together if they replace
    different positions.

    If vectors or positions differ between texts (`class_specific`, `image_conditioned`, `class_token_position`), the
    layer cannot know which text it sees. Pass them to `forward`, or use [`per_text`] around a call of the text model.

    Args:
        base_layer (`torch.nn.Module`):
            The text embeddings to wrap.
        adapter_name (`str`):
            The name of the first adapter.
        layout (`PromptLayout`):
            Its layout.
        image_width (`int`, *optional*):
            E, the width of the image embeddings, for `image_conditioned`.

    **Attributes**:
        - **learnable_embeddings** (`nn.ParameterDict`): (n, D) for each adapter, or (C, n, D) if class-specific.
        - **learnable_meta_in**, **learnable_meta_out** (`nn.ModuleDict`): The two linear layers from an image
          embedding to a shift of the vectors. They are kept apart since peft and transformers expect the name of the
          adapter right before the name of the weight.
    """

    adapter_layer_names = ("learnable_embeddings", "learnable_meta_in", "learnable_meta_out")
    other_param_names = (*CLIPPromptLayer.other_param_names, "prompt_configs")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layout: PromptLayout, image_width: int | None = None
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_embeddings = nn.ParameterDict({})
        self.learnable_meta_in, self.learnable_meta_out = nn.ModuleDict({}), nn.ModuleDict({})
        self.prompt_configs: dict[str, CLIPPromptTuningConfig] = {}  # what is saved; class names are kept up to date
        self._unmerged_rows: list[tuple[int, torch.Tensor]] = []  # (first row, saved rows), in the order of merging
        self.update_layer(adapter_name, layout, image_width)

    # transformers looks for the tables of the wrapped module here, and may replace them.
    def __getattr__(self, name):
        if name in TABLE_NAMES:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        if name in TABLE_NAMES:
            setattr(self.get_base_layer(), name, value)
        else:
            super().__setattr__(name, value)

    @property
    def token_table(self) -> nn.Module:
        """The token table (V, D), whatever its name is in the family."""
        return getattr(self, token_table_name(self.get_base_layer()))

    @property
    def position_table(self) -> nn.Module:
        """The position table, whatever its name is in the family."""
        return getattr(self, position_table_name(self.get_base_layer()))

    @property
    def weight(self) -> torch.Tensor:
        return self.token_table.weight

    def _in_effect(self) -> list[str]:
        return [] if self.disable_adapters else self.merged_adapters or self._active_here()

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of the adapter in effect, active or merged; `None` without one.

        Raises:
            ValueError: If several adapters are active that exclude each other.
        """
        names = self._in_effect()
        if not names:
            return None
        layouts = [self.prompt_layouts[name] for name in names]
        self._check_together(names)
        if len({layout.padded_template for layout in layouts}) > 1:
            raise ValueError(
                f"The active adapters {names} have different templates "
                f"({', '.join(repr(layout.padded_template) for layout in layouts)}); activate one of them only."
            )
        return layouts[0]

    @property
    def configs_in_effect(self) -> list[CLIPPromptTuningConfig]:
        """The configurations of the adapters in effect, active or merged, as they are saved."""
        return [self.prompt_configs[name] for name in self._in_effect() if name in self.prompt_configs]

    def set_class_names(self, class_names: list[str], tokenizer) -> None:
        """Changes the class names of the adapter in effect, in its layout and in the configuration that is saved."""
        name = self._in_effect()[0]
        self.prompt_layouts[name] = replace(self.prompt_layouts[name], class_names=class_names)
        config = self.prompt_configs.get(name)
        if config is not None:
            config.class_names = class_names
            record_token_ids(config, tokenizer)
        self._name_labels()

    def check_tokenizer(self, tokenizer) -> None:
        """Warns, once, if a tokenizer is another one than that of the training of the adapter in effect."""
        for name in self._in_effect()[:1]:
            if name in self.prompt_configs:
                check_token_ids(self.prompt_configs[name], tokenizer)

    def _names_in_effect(self) -> list[str] | None:
        names = self._in_effect()[:1]
        return self.prompt_layouts[names[0]].class_names if names else None

    def update_layer(self, adapter_name: str, layout: PromptLayout, image_width: int | None = None) -> None:
        """Adds the tensors of an adapter, not initialized. An older adapter of that name is replaced."""
        self._begin(adapter_name, layout)
        like = like_table(self.token_table)
        self.in_features, self.out_features = num_rows(self.token_table), like.shape[1]  # as LoRA on an embedding
        if layout.num_virtual_tokens:
            classes = (len(layout.class_names),) if layout.class_specific else ()
            shape = (*classes, layout.num_virtual_tokens, like.shape[1])
            self.learnable_embeddings[adapter_name] = nn.Parameter(empty_vectors(shape, like))
        if layout.image_conditioned:
            hidden = image_width // BOTTLENECK
            if hidden < 1:
                raise ValueError(
                    f"image_conditioned needs image embeddings of at least {BOTTLENECK} dimensions (the hidden layer "
                    f"has a {BOTTLENECK}th of them); this model's have {image_width}."
                )
            self.learnable_meta_in[adapter_name] = empty_linear(image_width, hidden, like)
            self.learnable_meta_out[adapter_name] = empty_linear(hidden, like.shape[1], like)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, config: CLIPPromptTuningConfig) -> None:
        """Initializes the tensors of an adapter as its configuration says."""
        if adapter_name in self.learnable_embeddings:
            self._reset_vectors(self.learnable_embeddings[adapter_name], config)
        for container in (self.learnable_meta_in, self.learnable_meta_out):
            if adapter_name in container:
                container[adapter_name].reset_parameters()

    def _reset_vectors(self, vectors: nn.Parameter, config: CLIPPromptTuningConfig) -> None:
        if config.prompt_tuning_init is PromptTuningInit.RANDOM:
            vectors.normal_(std=RANDOM_STD)
            return
        shape = vectors.shape[:-1]  # (n,) or (C, n)
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(num_rows(self.token_table), shape, device=vectors.device)
        else:
            ids = torch.tensor(config.init_token_ids, device=vectors.device).expand(shape)
        vectors.copy_(self.token_table(ids))

    def vectors(self, adapter_name: str, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the vectors of an adapter, differentiably.

        Args:
            adapter_name (`str`):
                An adapter with text vectors.
            image_embeds (`torch.Tensor`, *optional*):
                (B, E), L2-normalized. If the adapter is conditioned on the image, its vectors for each image are
                returned.

        Returns:
            `torch.Tensor`: (n, D); (C, n, D) if class-specific; (B, n, D) with `image_embeds`.
        """
        self._check_weights(adapter_name)
        vectors = entry_of(self.learnable_embeddings, adapter_name)
        if image_embeds is None or adapter_name not in self.learnable_meta_in:
            return vectors
        first, second = self.learnable_meta_in[adapter_name], self.learnable_meta_out[adapter_name]
        inputs = image_embeds.to(execution_device(first), first.weight.dtype)
        shift = second(first(inputs).relu())  # (B, D)
        return vectors + shift[:, None]  # (B, n, D)

    def per_text_vectors(self, image_embeds: torch.Tensor | None = None) -> torch.Tensor | None:
        """Returns the vectors of the active adapter for each class or image, or `None` if all texts share them.

        Args:
            image_embeds (`torch.Tensor`, *optional*):
                (B, E), L2-normalized.

        Returns:
            `torch.Tensor`: (C, n, D) if class-specific, (B, n, D) if conditioned on the image.
        """
        layout = self.prompt_layout
        if layout is None or not layout.has_per_text_vectors:
            return None
        return self.vectors(self._active_here()[0], image_embeds)

    @contextmanager
    def per_text(self, vectors: torch.Tensor | None = None, positions: torch.LongTensor | None = None):
        """Gives the R texts of a call of the text model their own vectors (R, n, D), at their own positions (R, n)."""
        token = _PER_TEXT.set({**(_PER_TEXT.get() or {}), id(self): PerText(vectors, positions)})
        try:
            yield
        finally:
            _PER_TEXT.reset(token)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        per_text: PerText | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor`, *optional*):
                (B, L) token ids, begin token first.
            position_ids (`torch.LongTensor`, *optional*):
                (1 or B, L). By default those of the wrapped module.
            inputs_embeds (`torch.Tensor`, *optional*):
                (B, L, D) instead of `input_ids`. The same positions are replaced.
            per_text (`PerText`, *optional*):
                The vectors and positions of each text, if they differ.
            kwargs:
                Further arguments of the wrapped module.

        Returns:
            `torch.Tensor`: (B, L, D), the output of the wrapped module, position embeddings included.

        Raises:
            ValueError: If a text ends before the replaced positions do, the positions of two active adapters overlap,
                or vectors or positions depend on the text and were not given.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._active_here()
        adapters = [name for name in active if self.prompt_layouts[name].num_virtual_tokens]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(
                input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
            )
        self._check_together(active)
        if inputs_embeds is None:
            inputs_embeds = self.token_table(input_ids)  # (B, L, D)
            if position_ids is None:
                position_ids = self._position_ids(input_ids)
        for name in adapters:
            inputs_embeds = self._replace(inputs_embeds, name, per_text or self._per_text_of_call(name))
        return self.base_layer(position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _position_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """Returns (B, L) if the wrapped module numbers positions by the token ids, as RoBERTa does, else `None`."""
        base = self.get_base_layer()
        create = getattr(base, "create_position_ids_from_input_ids", None)
        return None if create is None else create(input_ids, base.padding_idx)

    def _per_text_of_call(self, name: str) -> PerText:
        layout = self.prompt_layouts[name]
        if torch.compiler.is_compiling() and not (layout.has_per_text_vectors or layout.has_per_text_positions):
            return PerText()  # reading a context variable would break the graph
        return (_PER_TEXT.get() or {}).get(id(self), PerText())

    def _replace(self, inputs_embeds: torch.Tensor, name: str, per_text: PerText) -> torch.Tensor:
        layout = self.prompt_layouts[name]
        needs_vectors = layout.has_per_text_vectors and per_text.vectors is None
        if needs_vectors or (layout.has_per_text_positions and per_text.positions is None):
            raise ValueError(
                f"A text alone does not tell adapter {name!r} what to put in where, because {layout.merge_obstacle}. "
                "Classify with CLIPForPromptClassification, or give the vectors and positions of each text: "
                "with model.text_model.embeddings.per_text(vectors, positions): ..."
            )
        vectors = self.vectors(name) if per_text.vectors is None else per_text.vectors  # (n, D) or (B, n, D)
        start, end = layout.start_idx, layout.end_idx
        if inputs_embeds.shape[1] <= end:
            raise ValueError(
                f"Adapter {name!r} replaces positions {start} ... {end - 1} and needs an end token after them, but "
                f"the texts have only {inputs_embeds.shape[1]} tokens. Write the texts with the adapter's template "
                f"{layout.padded_template!r}."
            )
        vectors = vectors.to(inputs_embeds).expand(inputs_embeds.shape[0], -1, -1)  # (B, n, D)
        if per_text.positions is not None:
            positions = per_text.positions[:, :, None].expand_as(vectors)  # (B, n, D)
            return inputs_embeds.scatter(1, positions, vectors)
        return torch.cat([inputs_embeds[:, :start], vectors, inputs_embeds[:, end:]], dim=1)

    def _check_together(self, names: list[str]) -> None:
        """Raises `ValueError` unless the adapters of these names can be active together."""
        if len(names) < 2:
            return
        for name in names:
            obstacle = self.prompt_layouts[name].merge_obstacle
            if obstacle is not None:
                raise ValueError(
                    f"Adapter {name!r} works on its own only, because {obstacle}, but {names} are active; activate "
                    "one of them."
                )
        self._check_overlap(names)

    def _check_overlap(self, names: list[str]) -> None:
        layouts = ((self.prompt_layouts[name], name) for name in names)
        spans = sorted((layout.start_idx, layout.end_idx, name) for layout, name in layouts)
        for (_, end, left), (start, _, right) in zip(spans, spans[1:]):
            if start < end:
                raise ValueError(
                    f"Adapters {left!r} and {right!r} both replace position {start}; make only one of them active, or "
                    "give them separate positions by start_idx and num_virtual_tokens."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds vectors into the position table: `pos[start + i] += v[i] - token_table[replaced_token_ids[i]]`.

        The result is exact for texts that have the replaced tokens at the replaced positions, as all texts with the
        template of the adapter do. Other texts are changed in a meaningless way.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Whether to check the new rows for NaN and Inf before any row is changed.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge. By default the active ones.

        Raises:
            ValueError: If an adapter is of a kind that cannot be merged, two adapters replace the same position, or
                `safe_merge` finds NaN or Inf.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        self._check_overlap(self.merged_adapters + adapter_names)
        if has_offloaded_params(self.position_table):
            raise ValueError(
                "accelerate has offloaded the position table, and would load it again without the merged vectors; "
                "call accelerate.hooks.remove_hook_from_submodules(model) before merging, and offload it afterwards."
            )
        weight = self.position_table.weight
        if not (isinstance(weight, torch.Tensor) and weight.is_floating_point()):
            raise ValueError(
                "The position table is quantized, so vectors cannot be folded into it; merge first and quantize then."
            )
        table = weight.data  # (positions, D)
        merged = {name: self._merged_rows(name, table[self._table_rows(name)]) for name in adapter_names}
        broken = [name for name, rows in merged.items() if safe_merge and not torch.isfinite(rows).all()]
        if broken:
            # in the words of peft's methods, for those who look for them
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken.")
        for name, rows in merged.items():
            place = self._table_rows(name)
            self._unmerged_rows.append((place.start, table[place].clone()))
            table[place] = rows
            self.merged_adapters.append(name)
        self._name_labels()

    def _table_rows(self, name: str) -> slice:
        """Returns the rows of the position table that belong to the positions of an adapter."""
        first, layout = first_position_row(self.get_base_layer()), self.prompt_layouts[name]
        return slice(first + layout.start_idx, first + layout.end_idx)

    def _merged_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(name).data  # (n, D)
        ids = torch.tensor(self.prompt_layouts[name].replaced_token_ids, device=rows.device)
        # Computed in the precision of the vectors, so that a table in half precision is rounded only once.
        return (rows.to(vectors) + vectors - self.token_table(ids).data.to(vectors)).to(rows.dtype)

    def unmerge(self) -> None:
        """Restores the saved rows of the position table, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            start, rows = self._unmerged_rows.pop()
            table = self.position_table.weight.data
            table[start : start + len(rows)] = rows.to(table)
        self._name_labels()
