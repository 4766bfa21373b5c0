"""What the layers of the tuner have in common."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from peft import PromptTuningInit
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..towers import first_position_row, position_table_name, token_table_name
from .config import CLIPPromptTuningConfig
from .files import check_values
from .layout import PromptLayout


RANDOM_STD = 0.02  # of all freshly drawn vectors, in CoOp, MaPLe, IVLP and PromptSRC alike


class CLIPPromptLayer(nn.Module, BaseTunerLayer):
    """
    A module of CLIP together with the learnable tensors that act on its input or output.

    Tensors are held in containers named `learnable_*`, keyed by adapter. Which adapter is active, disabled or merged
    is state of the layer: a `PeftModel` calls the base model directly, and transformers' own `add_adapter` keeps no
    tuner object at all.
    """

    other_param_names = ("prompt_configs", "_placeholders")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_configs: dict[str, CLIPPromptTuningConfig] = {}
        # by adapter and parameter name: what is to be overwritten by saved weights and has not been yet
        self._placeholders: dict[str, dict[str, nn.Parameter]] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.prompt_configs]

    @contextmanager
    def _starting(self, adapter_name: str, config: CLIPPromptTuningConfig):
        """Enters an adapter, an older one of that name forgotten; its tensors are made in the body."""
        self.prompt_configs[adapter_name] = config
        self._placeholders.pop(adapter_name, None)
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container:
                del container[adapter_name]
        yield
        if config._loaded:
            self._placeholders[adapter_name] = dict(self.parameters_of(adapter_name))

    def parameters_of(self, adapter_name: str):
        """Names, relative to this layer, and tensors of an adapter."""
        for container_name in self.adapter_layer_names:
            for name, parameter in getattr(self, container_name).named_parameters(prefix=container_name):
                if name.split(".")[1] == adapter_name:
                    yield name, parameter

    def _check_weights(self, adapter_name: str) -> None:
        """Raises `ValueError` if weights were to be loaded and were not, of which transformers' `load_adapter` only
        warns, or if they hold NaN."""
        placeholders = self._placeholders.get(adapter_name)
        if not placeholders:
            return
        tensors = dict(self.parameters_of(adapter_name))
        if any(placeholders.get(key) is value for key, value in tensors.items()):
            raise ValueError(
                f"The configuration of adapter {adapter_name!r} belongs to saved weights, but none were loaded: the "
                "file is damaged, belongs to another model, or has the text tower at another path (then "
                "PeftModel.from_pretrained finds it). To start a new adapter, make a CLIPPromptTuningConfig without "
                "replaced_token_ids."
            )
        if not torch.compiler.is_compiling():  # which cannot look at values
            check_values(tensors)
            del self._placeholders[adapter_name]  # all is well for good

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for placeholders in self._placeholders.values():
            for key in [key for key in placeholders if f"{prefix}{key}" in state_dict]:
                del placeholders[key]

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of `adapter_names` that act here; raises `ValueError` if one of them cannot be merged at all."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.prompt_configs]
        for name in names:
            obstacle = self.prompt_configs[name].merge_obstacle
            if obstacle is not None:
                raise ValueError(
                    f"Adapter {name!r} cannot be merged: {obstacle}. Only vectors that are the same for every class "
                    "and image, at fixed positions of the text, can be folded into CLIP's position embeddings. Keep "
                    "the adapter, or export the image tower together with the class embeddings."
                )
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Only [`CLIPTextLearnableEmbeddings`] has something to fold in; other layers refuse what they hold."""
        self._adapters_to_merge(adapter_names)

    def unmerge(self) -> None:
        """Nothing is ever merged here."""

    def __repr__(self) -> str:
        return "clip_prompt_tuning." + super().__repr__()


def random_vectors(shape: tuple[int, ...], like: torch.Tensor, draw: bool = True) -> torch.Tensor:
    """normal(0, 0.02), in float32 at least: half precision is too coarse for the steps of an optimizer.

    Args:
        shape: of the result.
        like: for device and dtype.
        draw: `False` if values are about to be loaded; nothing is drawn from the random number generator then.
    """
    # Not zeros: what is never written to takes no memory, should a file ask for more vectors than it has.
    vectors = torch.empty(shape, dtype=trainable_dtype(like), device=like.device)
    return vectors.normal_(std=RANDOM_STD) if draw else vectors


def trainable_dtype(like: torch.Tensor) -> torch.dtype:
    """The dtype of `like`, but float32 at least."""
    return torch.promote_types(like.dtype, torch.float32)


BOTTLENECK = 16  # CoCoOp, trainers/cocoop.py: hidden width = width of the image embedding // 16


def build_meta_net(image_width: int, like: torch.Tensor, draw: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """The two linear maps from a normalised image embedding (B, E) to a shift of the vectors (B, D).

    Args:
        image_width: E.
        like: token embeddings (..., D), for width, device and dtype.
        draw: `False` if values are about to be loaded; nothing is drawn from the random number generator then.

    Raises:
        ValueError: if E is smaller than 16, which leaves no hidden units.
    """
    hidden = image_width // BOTTLENECK
    if hidden < 1:
        raise ValueError(
            f"image_conditioned needs image embeddings of at least {BOTTLENECK} dimensions (the hidden layer has a "
            f"{BOTTLENECK}th of them); this model's have {image_width}."
        )
    return build_linear(image_width, hidden, like, draw), build_linear(hidden, like.shape[-1], like, draw)


def run_meta_net(first: nn.Linear, second: nn.Linear, image_embeds: torch.Tensor) -> torch.Tensor:
    """(B, D) shift of the vectors for (B, E) image embeddings."""
    return second(first(image_embeds.to(first.weight)).relu())


def build_linear(width_in: int, width_out: int, like: torch.Tensor, draw: bool = True) -> nn.Linear:
    """A linear layer on the device of `like`, in float32 at least; initialised if `draw`."""
    options = {"device": like.device, "dtype": trainable_dtype(like)}
    make = nn.Linear if draw else partial(nn.utils.skip_init, nn.Linear)
    return make(width_in, width_out, **options)


TABLE_NAMES = ("token_embedding", "word_embeddings", "position_embedding", "position_embeddings", "position_ids")


@dataclass(frozen=True)
class Rows:
    """What differs between the texts of one call.

    Attributes:
        vectors: (R, n, D), one set for each of the R texts; `None` for the adapter's own.
        positions: (R, n), where the vectors go; `None` for `start_idx ... start_idx + n - 1`.
    """

    vectors: torch.Tensor | None = None
    positions: torch.LongTensor | None = None


class CLIPTextLearnableEmbeddings(CLIPPromptLayer):
    """
    Wraps `CLIPTextEmbeddings` or those of another family: token embeddings at `start_idx ... start_idx + n - 1` become
    learnable vectors.

    Position embeddings, and what else the family adds, are added by the wrapped module, unchanged. The wrapped tables
    are neither copied nor trained. Several adapters may be held; those that are active at the same time must replace
    different positions.

    Where vectors or positions differ between texts (`class_specific`, `image_conditioned`, `class_token_position`),
    the layer cannot know which text it sees: whoever encodes the texts hands that in with [`rows`].

    Args:
        base_layer: the text embeddings to wrap.
        adapter_name: name of the first adapter.
        config: its configuration, resolved (`replaced_token_ids` filled in).
        image_width: width E of the image embeddings, for `image_conditioned`.

    **Attributes**:
        - **learnable_embeddings** (`nn.ParameterDict`): (n, D), or (C, n, D) if class-specific, for each adapter.
        - **learnable_meta_in**, **learnable_meta_out** (`nn.ModuleDict`): the two linear maps from an image embedding
          to a shift of the vectors. Apart, since peft and transformers look for adapters right above the weights.
    """

    adapter_layer_names = ("learnable_embeddings", "learnable_meta_in", "learnable_meta_out")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: CLIPPromptTuningConfig,
        image_width: int | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_embeddings = nn.ParameterDict({})
        self.learnable_meta_in, self.learnable_meta_out = nn.ModuleDict({}), nn.ModuleDict({})
        self._rows: Rows | None = None
        self._unmerged_rows: list[tuple[int, torch.Tensor]] = []  # (first position, rows) in the order of merging
        self.update_layer(adapter_name, config, image_width)

    # The wrapped module's own parts stay reachable (and replaceable) where transformers looks for them.
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
    def token_table(self) -> nn.Embedding:
        """(V, D), whatever the family calls it."""
        return getattr(self, token_table_name(self.get_base_layer()))

    @property
    def position_table(self) -> nn.Embedding:
        """(positions, D), whatever the family calls it."""
        return getattr(self, position_table_name(self.get_base_layer()))

    @property
    def weight(self) -> torch.Tensor:
        return self.token_table.weight

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of the adapter in effect, merged ones included; `None` when disabled or without one."""
        names = [] if self.disable_adapters else self.merged_adapters or self._active_here()
        if not names:
            return None
        layouts = [self.prompt_configs[name] for name in names]
        self._check_together(names)
        if len({layout.padded_template for layout in layouts}) > 1:
            raise ValueError(
                f"The active adapters {names} have different templates "
                f"({', '.join(repr(layout.padded_template) for layout in layouts)}); activate one of them only."
            )
        return layouts[0]

    def update_layer(self, adapter_name: str, config: CLIPPromptTuningConfig, image_width: int | None = None) -> None:
        """Adds an adapter, or starts one of that name anew."""
        with self._starting(adapter_name, config):
            if config.num_virtual_tokens:
                self.learnable_embeddings[adapter_name] = nn.Parameter(self._initial_values(config))
            if config.image_conditioned:
                first, second = build_meta_net(image_width, self.weight, draw=not config._loaded)
                self.learnable_meta_in[adapter_name], self.learnable_meta_out[adapter_name] = first, second

    @torch.no_grad()
    def _initial_values(self, config: CLIPPromptTuningConfig) -> torch.Tensor:
        """(n, D) or (C, n, D), in float32 at least: half precision is too coarse for the steps of an optimizer."""
        table = self.token_table.weight  # (V, D)
        classes = (len(config.class_names),) if config.class_specific else ()
        shape = (*classes, config.num_virtual_tokens)
        if config.prompt_tuning_init is PromptTuningInit.RANDOM or config._loaded:
            return random_vectors((*shape, table.shape[1]), table, draw=not config._loaded)
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(table.shape[0], shape, device=table.device)
        else:
            ids = torch.tensor(config.init_token_ids, device=table.device).expand(shape)
        return table[ids].to(trainable_dtype(table))

    def vectors(self, adapter_name: str, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors of an adapter, differentiable.

        Args:
            adapter_name: one that has text vectors.
            image_embeds: (B, E), L2-normalised. With them, and for an adapter that is conditioned on the image, the
                vectors are those of each image.

        Returns:
            (n, D); (C, n, D) if class-specific; (B, n, D) with `image_embeds`.
        """
        self._check_weights(adapter_name)
        vectors = self.learnable_embeddings[adapter_name]
        if image_embeds is None or adapter_name not in self.learnable_meta_in:
            return vectors
        meta_net = self.learnable_meta_in[adapter_name], self.learnable_meta_out[adapter_name]
        shift = run_meta_net(*meta_net, image_embeds)  # (B, D)
        return vectors + shift[:, None]  # (B, n, D)

    def row_vectors(self, image_embeds: torch.Tensor | None = None) -> torch.Tensor | None:
        """What the adapter in effect puts into each class's, or each image's, texts; `None` if it is the same in all.

        Args:
            image_embeds: (B, E), L2-normalised.

        Returns:
            (C, n, D) if class-specific, (B, n, D) if conditioned on the image.
        """
        layout = self.prompt_layout
        if layout is None or not layout.has_row_vectors:
            return None
        return self.vectors(self._active_here()[0], image_embeds)

    @contextmanager
    def rows(self, vectors: torch.Tensor | None = None, positions: torch.LongTensor | None = None):
        """Within it, the R texts of a call get their own vectors (R, n, D), at their own positions (R, n)."""
        previous, self._rows = self._rows, Rows(vectors, positions)
        try:
            yield
        finally:
            self._rows = previous

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: (B, L) token ids, begin token first.
            position_ids: (1 or B, L), by default those of the wrapped module.
            inputs_embeds: (B, L, D) instead of `input_ids`; replaced at the same positions.
            kwargs: what else the wrapped module takes.

        Returns:
            (B, L, D), what the wrapped module makes of the token embeddings: position embeddings are added at least.

        Raises:
            ValueError: if the texts end before, or with, the replaced positions; if the positions of two active
                adapters overlap; if vectors or positions depend on the text and were not handed in.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self._active_here() if self.prompt_configs[name].num_virtual_tokens]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(
                input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
            )
        self._check_together(self._active_here())
        if inputs_embeds is None:
            inputs_embeds = self.token_table(input_ids)  # (B, L, D)
            if position_ids is None:
                position_ids = self._position_ids(input_ids)
        for name in adapters:
            inputs_embeds = self._replace(inputs_embeds, name)
        return self.base_layer(position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _position_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """(B, L) where the wrapped module numbers tokens by their ids, past the padding, as RoBERTa does; otherwise
        `None`."""
        base = self.get_base_layer()
        numbered = getattr(base, "create_position_ids_from_input_ids", None)
        return None if numbered is None else numbered(input_ids, base.padding_idx)

    def _replace(self, inputs_embeds: torch.Tensor, name: str) -> torch.Tensor:
        self._check_rows(name)
        rows = self._rows or Rows()
        vectors = self.vectors(name) if rows.vectors is None else rows.vectors  # (n, D) or (B, n, D)
        start, end = self._span(name)
        if inputs_embeds.shape[1] <= end:
            raise ValueError(
                f"Adapter {name!r} replaces positions {start} ... {end - 1} and needs an end token after them, but "
                f"the texts have only {inputs_embeds.shape[1]} tokens. Write the texts with the adapter's template "
                f"{self.prompt_configs[name].padded_template!r}."
            )
        vectors = vectors.to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], -1, -1)  # (B, n, D)
        if rows.positions is not None:
            positions = rows.positions[:, :, None].expand_as(vectors)  # (B, n, D)
            return inputs_embeds.scatter(1, positions, vectors)
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

    def _check_together(self, names: list[str]) -> None:
        for name in names if len(names) > 1 else ():
            obstacle = self.prompt_configs[name].merge_obstacle
            if obstacle is not None:
                raise ValueError(
                    f"Adapter {name!r} works on its own only, because {obstacle}, but {names} are active; activate "
                    "one of them."
                )
        self._check_overlap(names)

    def _check_rows(self, name: str) -> None:
        config, rows = self.prompt_configs[name], self._rows or Rows()
        if (config.has_row_vectors and rows.vectors is None) or (config.has_row_positions and rows.positions is None):
            raise ValueError(
                f"A text alone does not tell adapter {name!r} what to put in where, because {config.merge_obstacle}. "
                "Classify with CLIPForPromptClassification, or hand in vectors and positions of each text: "
                "with model.text_model.embeddings.rows(vectors, positions): ..."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds the vectors into the position table: `pos[start + i] += v[i] - token_table[replaced_token_ids[i]]`.

        Exact for texts that carry the replaced tokens at the replaced positions, as all that are written with the
        adapter's template do. Other texts are changed in a meaningless way.

        Args:
            safe_merge: check the results for NaN and Inf before any row is changed.
            adapter_names: adapters to merge; by default the active ones.

        Raises:
            ValueError: if an adapter is of a kind that cannot be folded in, two adapters replace the same position, or
                `safe_merge` finds something.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        self._check_overlap(self.merged_adapters + adapter_names)
        table = self.position_table.weight.data  # (positions, D)
        folded = {name: self._folded_rows(name, table[self._rows_of(name)]) for name in adapter_names}
        broken = [name for name, rows in folded.items() if safe_merge and not torch.isfinite(rows).all()]
        if broken:
            raise ValueError(f"NaN or Inf in the merged rows; the adapter {broken[0]!r} seems to be broken.")
        for name, rows in folded.items():
            place = self._rows_of(name)
            self._unmerged_rows.append((place.start, table[place].clone()))
            table[place] = rows
            self.merged_adapters.append(name)

    def _rows_of(self, name: str) -> slice:
        """The rows of the position table that belong to the adapter's positions."""
        first, (start, end) = first_position_row(self.get_base_layer()), self._span(name)
        return slice(first + start, first + end)

    def _folded_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(name).data  # (n, D)
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
            table = self.position_table.weight.data
            table[start : start + len(rows)] = rows.to(table)
