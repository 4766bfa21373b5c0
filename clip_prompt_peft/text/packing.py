"""Class prompts as batches of the text tower: one prompt in each sequence, or many behind the prefix that they share.

Beside the usual shapes: `K` classes in a chunk, `R` packed sequences of `T` tokens. `B` is the number of images if the
adapter makes other vectors for every image, and 1 otherwise.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import Aimv2TextModel, CLIPModel, CLIPTextModel, MetaClip2TextModel
from transformers.models.groupvit.modeling_groupvit import GroupViTTextTransformer

from ..towers import drops_out, final_norm_of, is_intercepted, is_shared, text_embeddings_of, text_side
from ..tuner.base_layer import CLIPPromptLayer
from ..tuner.layer import PerText
from ..tuner.layout import PromptLayout
from ..tuner.vectors import CLIPDeepPrompts
from .prompts import ClassPrompts


PACKED, CUT, PLAIN = "packed", "cut", "plain"
PATHS = (PACKED, CUT, PLAIN)  # from the fastest to the one that assumes nothing

# The number of suffix tokens in a packed sequence. With more, attention costs more; with fewer, the prefix is repeated
# more often. Measured with 5 and 17 shared tokens, all values from 80 to 200 take the same time.
PACKED_TOKENS = 160
PREFIX, FILLER = 0, -1  # segments of a packed sequence; class i of the chunk is segment i + 1

# What makes packing exact: a causal text model that only embeds, encodes and normalizes, attention that adds any mask
# to its scores, and layers that treat every token on its own.
CAUSAL_TEXT_MODELS = (CLIPTextModel, MetaClip2TextModel, Aimv2TextModel, GroupViTTextTransformer)
ADDITIVE_ATTENTION = ("eager", "sdpa")
TOKENWISE_MODULES = (
    "torch.nn.modules.",
    "transformers.activations",
    "transformers.models.clip.modeling_clip",
    "transformers.models.metaclip_2.modeling_metaclip_2",
    "transformers.models.aimv2.modeling_aimv2",
    "transformers.models.groupvit.modeling_groupvit",
    "peft.tuners.lora.",
    "peft.tuners.ln_tuning.",
    "clip_prompt_peft.class_head.",
    "peft.tuners.ia3.",
    "peft.tuners.trainable_tokens.",
    "peft.tuners._buffer_dict",
    "peft.utils.other",
)


# Classes of a quantization that keep the weights in few bits and compute with them in floating point. `Linear8bitLt`
# of bitsandbytes is not among them: it rounds activations, and those of outliers by what is in the whole batch.
TOKENWISE_QUANTIZED = ("bitsandbytes.nn.modules.Linear4bit", "optimum.quanto.nn.qlinear.QLinear")
WEIGHT_ONLY_TENSORS = ("torchao.quantization.", "optimum.quanto.tensor.weights.")


def exact_path(model: CLIPModel) -> str:
    """Returns the fastest path that gives the class embeddings of the plain one, as far as that is known beforehand.

    - `"plain"`: every prompt is a sequence of its own, padded to the full length. It is always right.
    - `"cut"`: sequences end with the longest prompt. It is right if a token attends only to those before it.
    - `"packed"`: many prompts are in one sequence, behind the positions that they share. It is right if, besides, the
      tower treats every token on its own except in attention, whose mask can be chosen, and draws no random numbers:
      in training with dropout, all classes would have the same ones in the positions that they share.

    Only towers of known classes, with known adapters in them, leave the plain path, and only without hooks, which
    expect to see one prompt in each sequence.
    """
    text_model = model.text_model
    attention, is_causal = attention_of(text_model)
    if type(text_model) not in CAUSAL_TEXT_MODELS or not is_causal or not _is_known_side(model):
        return PLAIN
    is_random = any(drops_out(module) for part in text_side(model) for module in part.modules())
    return PACKED if attention in ADDITIVE_ATTENTION and not is_random else CUT


def attention_of(text_model: nn.Module) -> tuple[str, bool]:
    """Returns the attention implementation, and whether transformers makes causal masks for it."""
    return text_model.config._attn_implementation, getattr(text_model.config, "is_causal", True)


def _is_known_side(model: nn.Module) -> bool:
    return all(_is_known(module) for part in text_side(model) for module in part.modules())


def _is_known(module: nn.Module) -> bool:
    if is_intercepted(module):
        return False
    if isinstance(module, CLIPPromptLayer):
        return True
    if f"{type(module).__module__}.{type(module).__name__}" in TOKENWISE_QUANTIZED:
        return True
    is_known_class = f"{type(module).__module__}.".startswith(TOKENWISE_MODULES)
    return is_known_class and all(_keeps_tokens_apart(tensor) for tensor in module._parameters.values())


def _keeps_tokens_apart(weight: torch.Tensor | None) -> bool:
    """Returns whether products with a weight are of single tokens: of a plain tensor, or one of quantized weights.

    Where activations are quantized, too, the scale can be that of all tokens, and rounding makes small differences
    large.
    """
    if weight is None or not hasattr(weight, "__tensor_flatten__") or is_shared(weight):
        return True
    name = f"{type(weight).__module__}.{type(weight).__name__}"
    return name.startswith(WEIGHT_ONLY_TENSORS) and getattr(weight, "act_quant_kwargs", None) is None


@dataclass(frozen=True)
class PlainPrompts:
    """
    The prompts of a chunk of classes, one in each sequence.

    Attributes:
        classes: (K,) indices of the classes.
        input_ids: (K, L).
        attention_mask: (K, L), or `None` if it changes nothing. With a mask, transformers looks in every call whether
            it masks anything, and the host waits for a device.
        positions: (K, n) positions of the vectors, if these differ between classes.
    """

    classes: torch.LongTensor
    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor | None
    positions: torch.LongTensor | None

    def encode(
        self,
        model: CLIPModel,
        layout: PromptLayout | None,
        image_vectors: torch.Tensor | None = None,
        class_priors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the class embeddings (B, K, E), L2-normalized.

        Args:
            model (`CLIPModel`):
                The model whose text tower is run.
            layout (`PromptLayout`, *optional*):
                The layout of the active prompt adapter.
            image_vectors (`torch.Tensor`, *optional*):
                (B, n, D), the vectors for each image, for an adapter that is conditioned on it.
            class_priors (`torch.Tensor`, *optional*):
                (C, E), the zero-shot embeddings of all classes, for an adapter with a `class_aware_layer`.
        """
        num_images = 1 if image_vectors is None else len(image_vectors)
        per_text = _per_text(model, layout, self, image_vectors)
        embeddings = text_embeddings_of(model.text_model)
        context = nullcontext() if per_text is None else embeddings.per_text(per_text.vectors, per_text.positions)
        of_classes = nullcontext()
        if class_priors is not None:
            layer = class_aware_layer_of(model.text_model)
            of_classes = layer.per_class(layer.class_vectors(class_priors[self.classes]))  # (K, n, D)
        mask = None if self.attention_mask is None else self.attention_mask.repeat(num_images, 1)
        with context, of_classes:
            outputs = model.get_text_features(input_ids=self.input_ids.repeat(num_images, 1), attention_mask=mask)
        return normalize(outputs.pooler_output).view(num_images, len(self.classes), -1)


@dataclass(frozen=True)
class PackedPrompts:
    """
    The prompts of a chunk of classes, many in each sequence: `[shared prefix | suffix 1 | suffix 2 | ...]`.

    In a causal tower, the hidden states of the positions that all classes share are the same, too. They are computed
    once for each sequence. Each suffix attends to them and to itself, at the positions of its own prompt.

    Attributes:
        classes: (K,) indices of the classes.
        input_ids: (K, L), one prompt in each row.
        positions: (K, n) positions of the vectors, if these differ between classes.
        token_index: (R, T) index of each packed token in the flattened `input_ids`.
        segment: (R, T) number of the suffix that a token belongs to.
        end_index: (K,) index of the end token of each class in the flattened packed sequences.
    """

    classes: torch.LongTensor
    input_ids: torch.LongTensor
    positions: torch.LongTensor | None
    token_index: torch.LongTensor
    segment: torch.LongTensor
    end_index: torch.LongTensor

    def encode(
        self,
        model: CLIPModel,
        layout: PromptLayout | None,
        image_vectors: torch.Tensor | None = None,
        class_priors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the class embeddings (B, K, E), equal to those of [`PlainPrompts`].

        Without class priors, which need [`~class_aware.ClassAwarePrompts`].
        """
        num_images = 1 if image_vectors is None else len(image_vectors)
        packed = self.embed(model, layout, image_vectors)  # (B R, T, D)
        mask = self.attention_mask(packed.dtype).repeat(num_images, 1, 1, 1)  # (B R, 1, T, T)
        # The text model takes token ids only, and no more than it has positions, so its parts are called one by one.
        return self.pool(model, model.text_model.encoder(inputs_embeds=packed, attention_mask=mask).last_hidden_state)

    def to(self, device: torch.device) -> PackedPrompts:
        """Returns the prompts on a device."""
        return PackedPrompts(*_on(device, *(getattr(self, field.name) for field in fields(self))))

    def embed(
        self, model: CLIPModel, layout: PromptLayout | None, image_vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the packed embeddings (B R, T, D) that go into the first layer."""
        num_images = 1 if image_vectors is None else len(image_vectors)
        per_text = _per_text(model, layout, self, image_vectors)
        options = {} if per_text is None else {"per_text": per_text}
        embeds = text_embeddings_of(model.text_model)(input_ids=self.input_ids.repeat(num_images, 1), **options)
        tokens = embeds.view(num_images, -1, embeds.shape[-1])  # (B, K L, D)
        return tokens.index_select(1, self.token_index.flatten()).view(-1, self.segment.shape[1], embeds.shape[-1])

    def pool(self, model: CLIPModel, states: torch.Tensor) -> torch.Tensor:
        """Returns the class embeddings (B, K, E) from the states (B R, T, D) behind the last layer."""
        num_images = len(states) // len(self.segment)
        states = final_norm_of(model.text_model)(states).view(num_images, -1, states.shape[-1])  # (B, R T, D)
        ends = states.index_select(1, self.end_index).flatten(0, 1)  # (B K, D), as a batch norm needs it
        return normalize(model.text_projection(ends)).view(num_images, len(self.classes), -1)  # (B, K, E)

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns (R, 1, T, T), added to the scores: a token sees the prefix and its own suffix, up to itself."""
        length = self.segment.shape[1]
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        visible = causal & ((query == key) | (key == PREFIX))  # (R, T, T)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def class_aware_layer_of(text_model: nn.Module) -> CLIPDeepPrompts:
    """Returns the layer of a text tower where the active adapter puts in vectors of the classes."""
    layers = (module for module in text_model.modules() if isinstance(module, CLIPDeepPrompts))
    return next(layer for layer in layers if layer.class_aware_adapter is not None)


def _per_text(
    model: CLIPModel,
    layout: PromptLayout | None,
    chunk: PlainPrompts | PackedPrompts,
    image_vectors: torch.Tensor | None,
) -> PerText | None:
    """Returns the vectors and positions of each text of a chunk, image by image; `None` if all texts share them."""
    if layout is None or not (layout.has_per_text_vectors or layout.has_per_text_positions):
        return None
    vectors, positions, num_images = None, chunk.positions, 1
    if layout.class_specific:
        vectors = text_embeddings_of(model.text_model).per_text_vectors()[chunk.classes]  # (K, n, D)
    elif layout.image_conditioned:
        num_images = len(image_vectors)
        vectors = image_vectors.repeat_interleave(len(chunk.classes), dim=0)  # (B K, n, D)
    return PerText(vectors, None if positions is None else positions.repeat(num_images, 1))  # (B K, n)


def build_chunk(
    path: str, classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, device: torch.device
) -> PlainPrompts | PackedPrompts:
    """Prepares the prompts of some classes (K,) for a path of the text tower."""
    if path == PACKED:
        return pack_prompts(classes, prompts, num_shared, device)
    missing = (prompts.full_length if path == PLAIN else 0) - prompts.input_ids.shape[1]
    input_ids = nn.functional.pad(prompts.input_ids[classes], (0, max(0, missing)), value=prompts.pad_token_id)
    attention_mask = nn.functional.pad(prompts.attention_mask[classes], (0, max(0, missing)))  # both (K, L)
    if path == CUT or attention_mask.all():  # padding is behind the text, where causal attention does not look
        attention_mask = None
    return PlainPrompts(*_on(device, classes, input_ids, attention_mask, _positions(prompts, classes)))


def pack_prompts(
    classes: torch.LongTensor, prompts: ClassPrompts, num_shared: int, device: torch.device
) -> PackedPrompts:
    """Distributes the prompts of a chunk over sequences of about equal length.

    Args:
        classes (`torch.LongTensor`):
            (K,) indices of the classes.
        prompts (`ClassPrompts`):
            The prompts of all classes.
        num_shared (`int`):
            P, the number of positions, from the begin token on, that are the same for all classes.
        device (`torch.device`):
            The device of the result.
    """
    input_ids = prompts.input_ids[classes]  # (K, L)
    lengths = prompts.attention_mask[classes].sum(dim=1)  # (K,)
    num_shared = min(num_shared, int(lengths.min()) - 1)  # every class has its own end token
    suffixes = lengths - num_shared  # (K,)
    num_sequences = max(1, round(int(suffixes.sum()) / PACKED_TOKENS))
    sequence, start = _distribute(suffixes, num_sequences)  # both (K,)
    start = start + num_shared
    length = int((start + suffixes).max())  # T

    token_index = torch.zeros(num_sequences, length, dtype=torch.long)
    segment = torch.full((num_sequences, length), FILLER)
    token_index[:, :num_shared] = torch.arange(num_shared)
    segment[:, :num_shared] = PREFIX
    owner = torch.repeat_interleave(torch.arange(len(classes)), suffixes)  # (all suffix tokens,)
    offset = torch.arange(len(owner)) - (suffixes.cumsum(0) - suffixes)[owner]  # within the suffix
    token_index[sequence[owner], start[owner] + offset] = owner * input_ids.shape[1] + num_shared + offset
    segment[sequence[owner], start[owner] + offset] = owner + 1
    end_index = sequence * length + start + suffixes - 1
    return PackedPrompts(
        *_on(device, classes, input_ids, _positions(prompts, classes), token_index, segment, end_index)
    )


def _distribute(sizes: torch.LongTensor, num_bins: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Returns the bin of every size and its place in the bin: largest first, from the left and the right in turn."""
    order = sizes.argsort(descending=True, stable=True)
    rounds, bins = torch.arange(len(sizes)) // num_bins, torch.arange(len(sizes)) % num_bins
    bins = torch.where(rounds % 2 == 0, bins, num_bins - 1 - bins)
    grid = torch.zeros(int(rounds[-1]) + 1, num_bins, dtype=torch.long)
    grid[rounds, bins] = sizes[order]
    starts = grid.cumsum(0) - grid
    bin_of, start = torch.empty_like(sizes), torch.empty_like(sizes)
    bin_of[order], start[order] = bins, starts[rounds, bins]
    return bin_of, start


def num_shared_positions(prompts: ClassPrompts, layout: PromptLayout | None) -> int:
    """Returns P, the number of positions, from the begin token on, that are the same in all prompts.

    Their token ids are equal, and the layout does not say that vectors differ between classes.
    """
    same = (prompts.input_ids == prompts.input_ids[0]).all(dim=0)  # (L,)
    num_equal = int(same.long().cumprod(dim=0).sum())
    at_most = None if layout is None else layout.num_shared_positions
    return num_equal if at_most is None else min(num_equal, at_most)


def tokens_of_class(path: str, prompts: ClassPrompts, num_shared: int) -> tuple[float, int]:
    """Returns how many tokens the tower computes for each class on a path, and the length of its sequences."""
    length = prompts.input_ids.shape[1]
    if path == PLAIN:
        length = max(length, prompts.full_length)
    if path != PACKED:
        return length, length
    lengths = prompts.attention_mask.sum(dim=1)  # (C,)
    num_shared = min(num_shared, int(lengths.min()) - 1)  # as in `pack_prompts`
    suffixes = lengths - num_shared
    mean = float(suffixes.float().mean())
    length = num_shared + min(int(suffixes.sum()), 2 * PACKED_TOKENS)  # `_distribute` balances about 160 of them
    return mean * (1 + num_shared / PACKED_TOKENS), length


def _positions(prompts: ClassPrompts, classes: torch.LongTensor) -> torch.LongTensor | None:
    return None if prompts.context_positions is None else prompts.context_positions[classes]


def _on(device: torch.device, *tensors: torch.Tensor | None):
    return (None if tensor is None else tensor.to(device) for tensor in tensors)


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Divides by the L2 norm over the last dimension, in at least float32: squares overflow in half precision."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return embeds / embeds.norm(dim=-1, keepdim=True)
