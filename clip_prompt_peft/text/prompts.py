"""Class names and a template become prompts, prompts become token ids.

Shapes: `C` classes, `L` text length (with begin and end token), `n` virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..templates import CLASS_SLOT, check_class_names, check_template
from ..tuner.layout import PromptLayout
from .tokenization import IGNORED, EncodedTexts, count_special_tokens, encode_texts, structural_ids


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """The tokenized prompts of all classes; equal to others with the same texts, tokens and positions.

    Attributes:
        texts: one prompt per class.
        input_ids: (C, L), cut after the longest prompt's end token; shorter ones are padded by the tokenizer. All are
            padded to the tower's last position if it pools that.
        attention_mask: (C, L), what the tower is to see.
        pad_token_id: what shorter prompts are padded with.
        full_length: to how many tokens prompts are padded where nothing is to be saved.
        context_positions: (C, n), where the vectors go if that differs from class to class.
    """

    texts: list[str]
    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    pad_token_id: int
    full_length: int
    context_positions: torch.LongTensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassPrompts):
            return NotImplemented
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return self is other or all(_same(one, another) for one, another in pairs)


def _same(one, another) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(another, torch.Tensor):
        return torch.equal(one, another)
    return one is another or (not isinstance(one, torch.Tensor) and one == another)


def build_class_prompts(
    class_names: Sequence[str],
    template: str,
    tokenizer,
    max_length: int,
    layout: PromptLayout | None = None,
    padding: str = IGNORED,
) -> ClassPrompts:
    """Writes every class name into the template and tokenizes the texts.

    Args:
        class_names: C names.
        template: text with one `{}`; not used when `layout` is given, which brings its own.
        tokenizer: the tokenizer of the model.
        max_length: positions of the text tower (77 for CLIP).
        layout: of the active prompt adapter, if there is one.
        padding: what the text tower makes of padding, see [`~tokenization.encode_texts`].

    Raises:
        ValueError: bad names or template; a prompt longer than `max_length`, with the class named; one that spells out
            a special token; one whose tokens at the replaced positions are not those that the adapter replaces; other
            classes than those that an adapter has class-specific vectors for.
    """
    class_names = check_class_names(class_names)
    if layout is not None:
        _check_class_specific(class_names, layout)
    template = template if layout is None else layout.padded_template
    check_template(template)
    texts = [template.replace(CLASS_SLOT, name) for name in class_names]
    encoded = encode_texts(texts, tokenizer, max_length, padding)
    _check_lengths(class_names, encoded.lengths, template, max_length)
    _check_special_tokens(texts, encoded, tokenizer)
    input_ids = encoded.input_ids  # (C, L)
    if layout is not None:
        _check_replaced_tokens(class_names, input_ids, layout)
    positions = None
    if layout is not None and layout.has_row_positions:
        input_ids, positions = _move_class_names(class_names, texts, input_ids, tokenizer, layout)
    full_length = max_length if padding == IGNORED else input_ids.shape[1]
    return ClassPrompts(texts, input_ids, encoded.attention_mask, tokenizer.pad_token_id, full_length, positions)


def _check_lengths(class_names, lengths, template, max_length) -> None:
    longest = int(lengths.argmax())
    if lengths[longest] > max_length:
        raise ValueError(
            f"The class name {class_names[longest]!r} in the template {template!r} makes {int(lengths[longest])} "
            f"tokens, but the text tower has {max_length} positions; shorten the name or the template."
        )


def _check_special_tokens(texts, encoded: EncodedTexts, tokenizer) -> None:
    # a second end token would be taken for the end of the text, and pooled
    special = torch.isin(encoded.input_ids, structural_ids(tokenizer)) & encoded.is_text  # (C, L)
    counts, expected = special.sum(dim=1), count_special_tokens(tokenizer)
    if (counts != expected).any():
        bad = int((counts != expected).nonzero()[0])
        raise ValueError(
            f"The prompt {texts[bad]!r} has {int(counts[bad])} special tokens, but a text has {expected} of them, "
            f"those that the tokenizer adds; leave {', '.join(map(repr, tokenizer.all_special_tokens))} out of names."
        )


def _check_replaced_tokens(class_names, input_ids, layout) -> None:
    start, n = layout.start_idx, layout.num_virtual_tokens
    expected = torch.tensor(layout.replaced_token_ids)
    replaced = input_ids[:, start : start + n]  # (C, n)
    fits = replaced.shape[1] == n and (replaced == expected).all(dim=1)
    if not torch.as_tensor(fits).all():
        bad = 0 if fits is False else int((~fits).nonzero()[0])
        raise ValueError(
            f"The prompt {layout.padded_template.replace(CLASS_SLOT, class_names[bad])!r} does not have the tokens "
            f"{layout.replaced_token_ids} at positions {start} ... {start + n - 1}, which the adapter's vectors "
            "replace. The class name must not merge with the words before it; use the template and the tokenizer "
            "that the adapter was made with."
        )


def _check_class_specific(class_names, layout) -> None:
    if layout.class_specific and layout.class_names is not None and class_names != layout.class_names:
        raise ValueError(
            f"The adapter has vectors of their own for each of its {len(layout.class_names)} classes "
            f"({layout.class_names[:5]}, in this order) and none for others, such as these {len(class_names)} "
            f"({class_names[:5]}); disable or switch the adapter, or train one with class_specific=False, which "
            "serves any classes."
        )


def _move_class_names(class_names, texts, input_ids, tokenizer, layout):
    name_at, first_token = layout.padded_template.index(CLASS_SLOT), layout.start_idx + layout.num_virtual_tokens
    alone = layout.class_token_count == "alone"
    num_name_tokens = count_name_tokens(class_names, texts, name_at, first_token, tokenizer, alone)
    return move_class_names(
        input_ids, num_name_tokens, layout.start_idx, layout.num_virtual_tokens, layout.num_vectors_before_class
    )


def count_name_tokens(
    class_names: Sequence[str], texts: Sequence[str], name_at: int, first_token: int, tokenizer, alone: bool
) -> list[int]:
    """How many tokens, from the end of the context on, are the class name.

    Args:
        class_names: C names.
        texts: their prompts, with the name at the end of the context.
        name_at: index of the name's first character.
        first_token: index of the name's first token.
        tokenizer: the tokenizer of the model.
        alone: count the tokens that the name has on its own, as CoOp's code does. It cuts off the end of a name that
            merges with what follows it.
    """
    if alone:
        return [len(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in class_names]
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which tokens of a prompt are the class name; set "
            "class_token_count='alone', or leave class_token_position at 'end'."
        )
    offsets = tokenizer(list(texts), return_offsets_mapping=True)["offset_mapping"]
    # a token that holds the end of the name together with punctuation behind it counts as the name's
    return [
        sum(start < name_at + len(name) and end > name_at for start, end in row[first_token:])
        for name, row in zip(class_names, offsets)
    ]


def move_class_names(
    input_ids: torch.LongTensor, num_name_tokens: Sequence[int], start: int, n: int, num_before: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Moves each class name in front of those vectors that are to follow it.

    Args:
        input_ids: (C, L), `n` context tokens at `start` with the class name behind them.
        num_name_tokens: of each class.
        start: position of the first vector.
        n: number of vectors.
        num_before: how many of them stay before the name.

    Returns:
        (C, L) token ids in their new order, and (C, n) the positions of the vectors.
    """
    split, end = start + num_before, start + n
    places = list(range(input_ids.shape[1]))
    orders, positions = [], []
    for length in num_name_tokens:
        orders.append(places[:split] + places[end : end + length] + places[split:end] + places[end + length :])
        positions.append(places[start:split] + places[split + length : end + length])
    return input_ids.gather(1, torch.tensor(orders)), torch.tensor(positions)
