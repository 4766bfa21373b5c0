"""Tokenized prompts from class names and a template.

Shapes: `C` classes, `L` text length (with begin and end token), `n` virtual tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

from ..templates import CLASS_SLOT, check_class_names, check_template
from ..tuner.config import CLIPPromptTuningConfig
from ..tuner.layout import PromptLayout
from ..tuner.token_ids import check_token_ids
from .tokenization import IGNORED, EncodedTexts, count_special_tokens, encode_texts, structural_ids


# The classes that a warning has named, by tokenizer: prompts are built for every layout and every template.
_reported: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """
    The tokenized prompts of all classes. Two of them are equal if all their attributes are.

    Attributes:
        texts (`list[str]`):
            One prompt for each class.
        input_ids (`torch.LongTensor`):
            (C, L), as long as the longest prompt, or with all positions if the tower pools the last one.
        attention_mask (`torch.LongTensor`):
            (C, L), 1 for tokens that the tower attends to.
        pad_token_id (`int`):
            The token that pads shorter prompts.
        full_length (`int`):
            The number of tokens to which the plain path pads prompts.
        context_positions (`torch.LongTensor`, *optional*):
            (C, n), the positions of the vectors if they differ between classes.
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
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    layout: PromptLayout | CLIPPromptTuningConfig | None = None,
    padding: str = IGNORED,
) -> ClassPrompts:
    """Inserts each class name into the template and tokenizes the texts.

    Args:
        class_names (`Sequence[str]`):
            C names.
        template (`str`):
            A text with one `{}`. It is not used with a `layout`, which has its own template.
        tokenizer:
            The tokenizer of the model.
        max_length (`int`):
            The number of positions of the text tower, 77 for CLIP.
        layout (`PromptLayout` or `CLIPPromptTuningConfig`, *optional*):
            The layout of the active prompt adapter, or its configuration in the model, `model.active_peft_config`.
        padding (`str`, *optional*, defaults to `"ignored"`):
            How the text tower treats padding, see [`~tokenization.encode_texts`].

    Raises:
        ValueError: If a name or the template is not valid, a prompt is longer than `max_length` or contains a special
            token, the tokens that the adapter replaces are not in their places, or its class-specific vectors belong
            to other classes.
    """
    class_names = check_class_names(class_names)
    if isinstance(layout, CLIPPromptTuningConfig):
        check_token_ids(layout, tokenizer)  # of a plain model, which does not know its tokenizer
        layout = PromptLayout.of(layout)
    if layout is not None:
        _check_class_specific(class_names, layout)
        template = layout.padded_template
    check_template(template)
    texts = [template.replace(CLASS_SLOT, name) for name in class_names]
    encoded = encode_texts(texts, tokenizer, max_length, padding)
    _check_lengths(class_names, encoded.lengths, template, max_length)
    _check_special_tokens(texts, encoded, tokenizer)
    input_ids, positions = encoded.input_ids, None  # (C, L)
    if layout is not None:
        _check_replaced_tokens(texts, input_ids, layout)
        if layout.has_per_text_positions:
            input_ids, positions = _move_class_names(class_names, texts, input_ids, tokenizer, layout)
    if layout is None or not layout.class_specific:
        _warn_of_equal_tokens(class_names, encoded.input_ids, tokenizer)
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
    # The tower would pool a second end token as the end of the text.
    special = torch.isin(encoded.input_ids, structural_ids(tokenizer)) & encoded.is_text  # (C, L)
    counts, expected = special.sum(dim=1), count_special_tokens(tokenizer)
    if (counts != expected).any():
        bad = int((counts != expected).nonzero()[0])
        raise ValueError(
            f"The prompt {texts[bad]!r} has {int(counts[bad])} special tokens, but the tokenizer adds {expected}; "
            f"leave {', '.join(map(repr, tokenizer.all_special_tokens))} out of class names."
        )


def _warn_of_equal_tokens(class_names, input_ids, tokenizer) -> None:
    """Names the classes whose prompts have the same tokens, once for each tokenizer."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, row in zip(class_names, input_ids.tolist()):
        groups.setdefault(tuple(row), []).append(name)
    equal = tuple(tuple(names) for names in groups.values() if len(names) > 1)
    known = _reported.setdefault(tokenizer, set())
    if not equal or equal in known:
        return
    known.add(equal)
    shown = "; ".join(
        " and ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for names in equal[:5]
    )
    more = f" and {len(equal) - 5} more groups" if len(equal) > 5 else ""
    warnings.warn(
        f"The tokenizer makes the same tokens of the class names {shown}{more}, so their logits are equal and only "
        "the first of them is ever predicted. Give them other names, or train vectors for each class "
        "(class_specific=True).",
        stacklevel=3,
    )


def _check_replaced_tokens(texts, input_ids, layout) -> None:
    start, n = layout.start_idx, layout.num_virtual_tokens
    expected = list(layout.replaced_token_ids)
    for text, replaced in zip(texts, input_ids[:, start : start + n].tolist()):
        if replaced != expected:
            raise ValueError(
                f"The prompt {text!r} does not have the tokens {expected} at positions {start} ... {start + n - 1}, "
                "which the adapter replaces; use its template and its tokenizer. The class name must not merge with "
                "the words before it."
            )


def _check_class_specific(class_names, layout) -> None:
    if layout.class_specific and layout.class_names is not None and class_names != layout.class_names:
        raise ValueError(
            f"The adapter has vectors of their own for each of its {len(layout.class_names)} classes "
            f"({layout.class_names[:5]}, in this order), not for these {len(class_names)} ({class_names[:5]}); "
            "disable or switch the adapter, or train one with class_specific=False."
        )


def _move_class_names(class_names, texts, input_ids, tokenizer, layout):
    name_at, first_token = layout.padded_template.index(CLASS_SLOT), layout.end_idx
    alone = layout.class_token_count == "alone"
    num_name_tokens = count_name_tokens(class_names, texts, name_at, first_token, tokenizer, alone)
    return move_class_names(
        input_ids, num_name_tokens, layout.start_idx, layout.num_virtual_tokens, layout.num_vectors_before_class
    )


def count_name_tokens(
    class_names: Sequence[str], texts: Sequence[str], name_at: int, first_token: int, tokenizer, alone: bool
) -> list[int]:
    """Returns the number of tokens of each class name in its prompt.

    Args:
        class_names (`Sequence[str]`):
            C names.
        texts (`Sequence[str]`):
            Their prompts, with the name at the end of the context.
        name_at (`int`):
            The index of the first character of the name.
        first_token (`int`):
            The index of the first token of the name.
        tokenizer:
            The tokenizer of the model.
        alone (`bool`):
            Whether to count the tokens that the name has on its own, as CoOp's code does. A name that merges with the
            text after it then loses its end.
    """
    if alone:
        return [len(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in class_names]
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which tokens of a prompt belong to the class name; set "
            "class_token_count='alone', or leave class_token_position at 'end'."
        )
    offsets = tokenizer(list(texts), return_offsets_mapping=True)["offset_mapping"]
    # A token that holds the end of the name and punctuation after it belongs to the name.
    return [
        sum(start < name_at + len(name) and end > name_at for start, end in row[first_token:])
        for name, row in zip(class_names, offsets)
    ]


def move_class_names(
    input_ids: torch.LongTensor, num_name_tokens: Sequence[int], start: int, n: int, num_before: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Moves each class name in front of the vectors that follow it.

    Args:
        input_ids (`torch.LongTensor`):
            (C, L), with `n` context tokens at `start` and the class name after them.
        num_name_tokens (`Sequence[int]`):
            The number of tokens of each class name.
        start (`int`):
            The position of the first vector.
        n (`int`):
            The number of vectors.
        num_before (`int`):
            The number of vectors that stay before the name.

    Returns:
        The token ids (C, L) in their new order, and the positions (C, n) of the vectors.
    """
    split, end = start + num_before, start + n
    places = list(range(input_ids.shape[1]))
    orders, positions = [], []
    for length in num_name_tokens:
        orders.append(places[:split] + places[end : end + length] + places[split:end] + places[end + length :])
        positions.append(places[start:split] + places[split + length : end + length])
    return input_ids.gather(1, torch.tensor(orders)), torch.tensor(positions)
