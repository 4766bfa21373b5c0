"""The text tower over one chunk of classes, one prompt a row or many.

Shapes beside the usual ones: `K` classes in the chunk, `R` packed rows of `T` tokens. `B` images, where the adapter
makes other vectors for every image, are one behind the other in the batch; without such an adapter, B is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import CLIPModel

from ..towers import adapter_settings, text_embeddings_of
from ..tuner.layout import PromptLayout
from .chunks import Surroundings
from .prompts import ClassPrompts


# Tokens of suffixes in a packed row. With more of them attention costs more, with fewer the prefix is repeated more
# often; measured with 5 and 17 shared tokens, anything from 80 to 200 takes the same time.
ROW_TOKENS = 160


PREFIX, FILLER = 0, -1  # segments of a packed row; class i of the chunk is segment i + 1


@dataclass(frozen=True)
class PlainRows:
    """One prompt a row.

    Attributes:
        classes: (K,) which classes these are.
        input_ids, attention_mask: (K, L).
        positions: (K, n) where the vectors go, if that differs from class to class.
    """

    classes: torch.LongTensor
    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    positions: torch.LongTensor | None

    def encode(self, model: CLIPModel, image_vectors: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K, E) normalised class embeddings, as `get_text_features` gives them.

        Args:
            model: whose text tower is run.
            image_vectors: (B, n, D), the vectors of each image, for an adapter that is conditioned on it.
        """
        num_images = 1 if image_vectors is None else len(image_vectors)
        with own_vectors(model.text_model, self, image_vectors):
            outputs = model.get_text_features(
                input_ids=self.input_ids.repeat(num_images, 1),
                attention_mask=self.attention_mask.repeat(num_images, 1),
            )
        return normalize(outputs.pooler_output).view(num_images, len(self.classes), -1)


@dataclass(frozen=True)
class PackedRows:
    """Many prompts a row: `[shared prefix | suffix of class 1 | suffix of class 2 | ...]`.

    In a tower that attends backwards only, the states of the positions that are the same for all classes are the same
    too. They are computed once a row; each suffix attends to them and to itself, at the positions that it has in its
    own prompt.

    Attributes:
        classes: (K,) which classes these are.
        input_ids: (K, L) their prompts, one a row.
        positions: (K, n) where the vectors go in them, if that differs from class to class.
        token_index: (R, T) where in the flattened prompts a packed token comes from.
        segment: (R, T) whose suffix a token belongs to.
        end_index: (K,) where in the flattened packed rows the end token of a class is.
    """

    classes: torch.LongTensor
    input_ids: torch.LongTensor
    positions: torch.LongTensor | None
    token_index: torch.LongTensor
    segment: torch.LongTensor
    end_index: torch.LongTensor

    def encode(self, model: CLIPModel, image_vectors: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K, E) normalised class embeddings, equal to those of [`PlainRows`]."""
        num_images = 1 if image_vectors is None else len(image_vectors)
        with own_vectors(model.text_model, self, image_vectors):
            embeddings = text_embeddings_of(model.text_model)
            embeds = embeddings(input_ids=self.input_ids.repeat(num_images, 1))  # (B K, L, D)
        tokens = embeds.view(num_images, -1, embeds.shape[-1])  # (B, K L, D)
        packed = tokens.index_select(1, self.token_index.flatten()).view(-1, self.segment.shape[1], embeds.shape[-1])
        mask = additive_mask(self._visible(), packed.dtype).repeat(num_images, 1, 1, 1)
        states = run_encoder(model.text_model, packed, mask)  # (B R, T, D)
        ends = states.view(num_images, -1, states.shape[-1]).index_select(1, self.end_index)  # (B, K, D)
        return normalize(model.text_projection(ends))

    def _visible(self) -> torch.Tensor:
        """(R, T, T): of what comes before it, a token sees the prefix and its own suffix."""
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        return backwards(self.segment.shape[1], self.segment.device) & ((query == key) | (key == PREFIX))


def pack_rows(classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, device: torch.device) -> PackedRows:
    """Lays the prompts of a chunk out in rows of about equal length.

    Args:
        classes: (K,) which classes these are.
        prompts: of all classes.
        num_shared: positions from the begin token on that are the same for all classes, P.
        device: of the result.
    """
    input_ids = prompts.input_ids[classes]  # (K, L)
    lengths = prompts.attention_mask[classes].sum(dim=1)  # (K,)
    num_shared = min(num_shared, int(lengths.min()) - 1)  # the end token is a class's own
    suffixes = lengths - num_shared  # (K,)
    num_rows = max(1, round(int(suffixes.sum()) / ROW_TOKENS))
    row, start = _deal(suffixes, num_rows)  # both (K,)
    start = start + num_shared
    length = int((start + suffixes).max())  # T

    token_index = torch.zeros(num_rows, length, dtype=torch.long)
    segment = torch.full((num_rows, length), FILLER)
    token_index[:, :num_shared] = torch.arange(num_shared)
    segment[:, :num_shared] = PREFIX
    owner = torch.repeat_interleave(torch.arange(len(classes)), suffixes)  # (all suffix tokens,)
    offset = torch.arange(len(owner)) - (suffixes.cumsum(0) - suffixes)[owner]  # within the suffix
    token_index[row[owner], start[owner] + offset] = owner * input_ids.shape[1] + num_shared + offset
    segment[row[owner], start[owner] + offset] = owner + 1
    end_index = row * length + start + suffixes - 1
    rows = (classes, input_ids, _positions(prompts, classes), token_index, segment, end_index)
    return PackedRows(*(None if tensor is None else tensor.to(device) for tensor in rows))


def _deal(sizes: torch.LongTensor, num_rows: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Row and place in it for every size: the largest first, from the left and from the right in turn."""
    order = sizes.argsort(descending=True, stable=True)
    rounds, places = torch.arange(len(sizes)) // num_rows, torch.arange(len(sizes)) % num_rows
    places = torch.where(rounds % 2 == 0, places, num_rows - 1 - places)
    grid = torch.zeros(int(rounds[-1]) + 1, num_rows, dtype=torch.long)
    grid[rounds, places] = sizes[order]
    starts = grid.cumsum(0) - grid
    row, start = torch.empty_like(sizes), torch.empty_like(sizes)
    row[order], start[order] = places, starts[rounds, places]
    return row, start


def run_encoder(text_model: nn.Module, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(R, T, D) last hidden states of the text model for given embeddings (R, T, D) and an additive mask (R, 1, T, T).

    The text model itself takes token ids only, and no more of them than it has positions, so its parts are called one
    after the other. [`fastest_exact_path`] makes sure that this is what the text model does.
    """
    states = text_model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    return text_model.final_layer_norm(states)


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, 1, T, T) to be added to attention scores, from a boolean (R, T, T), which eager attention would take for
    numbers."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def backwards(length: int, device: torch.device) -> torch.Tensor:
    """(T, T): each token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def plain_rows(classes: torch.LongTensor, prompts: ClassPrompts, length: int, device: torch.device) -> PlainRows:
    """The prompts of these classes (K,), padded to `length` tokens."""
    input_ids, attention_mask = prompts.input_ids[classes], prompts.attention_mask[classes]  # both (K, L)
    missing = length - input_ids.shape[1]
    input_ids = nn.functional.pad(input_ids, (0, missing), value=prompts.pad_token_id)
    attention_mask = nn.functional.pad(attention_mask, (0, missing))
    rows = (classes, input_ids, attention_mask, _positions(prompts, classes))
    return PlainRows(*(None if tensor is None else tensor.to(device) for tensor in rows))


def _positions(prompts: ClassPrompts, classes: torch.LongTensor) -> torch.LongTensor | None:
    return None if prompts.context_positions is None else prompts.context_positions[classes]


def own_vectors(text_model: nn.Module, rows: PlainRows | PackedRows, image_vectors: torch.Tensor | None = None):
    """Within it, the text embeddings know what the adapter puts where in each of these prompts, image by image.

    Nothing, unless the active adapter says that vectors or positions differ between them.
    """
    layout = getattr(text_embeddings_of(text_model), "prompt_layout", None)
    if layout is None or not (layout.has_row_vectors or layout.has_row_positions):
        return nullcontext()
    vectors, positions, num_images = None, rows.positions, 1
    if layout.class_specific:
        vectors = text_embeddings_of(text_model).row_vectors()[rows.classes]  # (K, n, D)
    elif layout.image_conditioned:
        num_images = len(image_vectors)
        vectors = image_vectors.repeat_interleave(len(rows.classes), dim=0)  # (B K, n, D)
    if positions is not None:
        positions = positions.repeat(num_images, 1)  # (B K, n)
    return text_embeddings_of(text_model).rows(vectors, positions)


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Divides by the L2 norm over the last dimension, in float32 at least: squares overflow in half precision."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return embeds / embeds.norm(dim=-1, keepdim=True)


PACKED, CUT, PLAIN = "packed", "cut", "plain"


PATHS = (PACKED, CUT, PLAIN)  # from the fastest to the one that assumes nothing


# Attention kernels that add a mask to the scores as it is; others want masks of their own kind, or none.
ADDITIVE_MASKS = ("eager", "sdpa")


def what_decides(model: CLIPModel, layout: PromptLayout | None) -> Hashable:
    """All that the fastest exact path depends on, so that it need not be found out again where this is the same."""
    text_model = model.text_model
    modules = list(text_model.modules())
    kind = None if layout is None else (layout.start_idx, layout.num_virtual_tokens, layout.has_row_vectors)
    settings = (attention_of(text_model), text_model.dtype, text_model.device, kind, repr(adapter_settings(modules)))
    return tuple(map(weakref.ref, modules)), settings


@torch.no_grad()
def fastest_exact_path(model: CLIPModel, prompts: ClassPrompts) -> str:
    """`"packed"`, `"cut"` or `"plain"`: the first that gives what the plain path gives. Found out by trying.

    - `plain`: every prompt in a row of its own, padded to `prompts.full_length`. Always right.
    - `cut`: rows end with the longest prompt. Right where a token sees only those before it.
    - `packed`: many prompts a row, behind the positions that they share. Right where, besides, the attention takes any
      mask, and the text model does nothing but embed, encode and normalise.
    """
    text_model = model.text_model
    row = build_rows(PLAIN, torch.tensor([0]), prompts, 0, text_model)  # the prompt of the first class
    surroundings = Surroundings(row.input_ids)
    with torch.autocast(row.input_ids.device.type, enabled=False):  # less precision, less to be told by comparing
        with surroundings.random_state():  # dropout, if there is any, drops the same each time
            states = _states(text_model, row)
        with surroundings.random_state():
            states_of_other_end = _states(text_model, _with_another_end(row))
        if not torch.allclose(states[:, :-1], states_of_other_end[:, :-1]):
            return PLAIN
        if attention_of(text_model)[0] not in ADDITIVE_MASKS:
            return CUT
        with surroundings.random_state():
            states_by_parts = _states_by_parts(text_model, row)
    error = (states_by_parts - states).abs().max() / states.abs().max()
    return PACKED if error < torch.finfo(states.dtype).eps ** 0.5 else CUT


def attention_of(text_model: nn.Module) -> tuple[str, bool]:
    """The implementation of its attention, and whether transformers makes its masks causal."""
    return text_model.config._attn_implementation, getattr(text_model.config, "is_causal", True)


def _states(text_model: nn.Module, row: PlainRows) -> torch.Tensor:
    """(1, tokens of the prompt, D)"""
    with own_vectors(text_model, row, _any_image_vectors(text_model)):
        states = text_model(input_ids=row.input_ids, attention_mask=row.attention_mask).last_hidden_state
    return states[:, : int(row.attention_mask.sum())]


def _states_by_parts(text_model: nn.Module, row: PlainRows) -> torch.Tensor:
    """(1, tokens of the prompt, D), in the way of packed rows"""
    with own_vectors(text_model, row, _any_image_vectors(text_model)):
        embeds = text_embeddings_of(text_model)(input_ids=row.input_ids)
    visible = backwards(embeds.shape[1], embeds.device)[None]
    states = run_encoder(text_model, embeds, additive_mask(visible, embeds.dtype))
    return states[:, : int(row.attention_mask.sum())]


def _any_image_vectors(text_model: nn.Module) -> torch.Tensor | None:
    """(1, n, D) for an adapter that is conditioned on the image: those that no image has shifted."""
    layout = getattr(text_embeddings_of(text_model), "prompt_layout", None)
    is_conditioned = layout is not None and layout.image_conditioned
    return text_embeddings_of(text_model).row_vectors()[None] if is_conditioned else None


def _with_another_end(row: PlainRows) -> PlainRows:
    """The begin token in place of the last one."""
    input_ids = row.input_ids.clone()
    input_ids[0, int(row.attention_mask.sum()) - 1] = input_ids[0, 0]
    return replace(row, input_ids=input_ids)


def num_shared_positions(prompts: ClassPrompts, layout: PromptLayout | None) -> int:
    """How many positions, from the begin token on, hold the same in all prompts: P.

    Those whose token ids are equal; fewer if the layout says that vectors differ between classes.
    """
    same = (prompts.input_ids == prompts.input_ids[0]).all(dim=0)  # (L,)
    num_equal = int(same.long().cumprod(dim=0).sum())
    at_most = getattr(layout, "num_shared_positions", None)
    return num_equal if at_most is None else min(num_equal, at_most)


def build_rows(
    path: str, classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, text_model: nn.Module
) -> PlainRows | PackedRows:
    """The rows in which `path` encodes these classes (K,)."""
    device = text_model.device
    if path == PACKED:
        return pack_rows(classes, prompts, num_shared, device)
    length = prompts.full_length if path == PLAIN else prompts.input_ids.shape[1]
    return plain_rows(classes, prompts, length, device)
