"""Class names and a template become prompts, prompts become token ids.

Shapes: `C` classes, `L` text length (with begin and end token), `n` virtual tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from .class_token_position import count_name_tokens, move_class_names
from .tokenization import (
    IGNORED,
    EncodedTexts,
    count_begin_tokens,
    count_special_tokens,
    encode_texts,
    encode_words,
    structural_ids,
)


DEFAULT_TEMPLATE = "a photo of a {}."
PLACEHOLDER = "X"  # the word that CoOp writes where a vector will stand
CLASS_SLOT = "{}"


class PromptLayout(Protocol):
    """What the classifier reads of the active prompt adapter: which texts the vectors expect to stand in.

    An object with these fields is found at `prompt_layout` of the text embedding module; it is `None` there when no
    prompt adapter is in effect. `class_names` may be assigned: it is saved with the adapter.
    """

    class_names: list[str] | None
    problem_type: str | None
    prompt_template: str
    padded_template: str
    start_idx: int
    num_virtual_tokens: int
    replaced_token_ids: list[int]

    # kind of context
    class_specific: bool
    image_conditioned: bool
    has_row_vectors: bool  # either of the two
    has_row_positions: bool  # positions differ from class to class
    class_token_count: str  # "in_prompt" or "alone"
    num_vectors_before_class: int
    num_shared_positions: int | None  # from the begin token on, the same for all classes; None if the texts tell

    num_vision_virtual_tokens: int  # above 0, image embeddings are the adapter's and cannot be made in advance
    regularizer: str | None
    regularizer_weights: dict[str, float] | None
    teacher_templates: list[str] | None


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


def check_template(template: str) -> None:
    """Raises `ValueError` unless `template` is a string that holds `{}`, the place of the class name, exactly once."""
    if not isinstance(template, str):
        raise ValueError(f"A prompt template must be a string such as {DEFAULT_TEMPLATE!r}, got {template!r}.")
    _check_characters("The prompt template", template)
    if template.count(CLASS_SLOT) != 1:
        raise ValueError(
            f"The prompt template {template!r} holds {{}} {template.count(CLASS_SLOT)} times; it must hold it exactly "
            f"once, where the class name goes, as in {DEFAULT_TEMPLATE!r}."
        )


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Returns the class names as a list.

    Raises:
        ValueError: if there are none, or one is empty, not a string of characters, or there twice.
    """
    if isinstance(class_names, (str, Set, Mapping)) or not isinstance(class_names, Iterable):
        raise ValueError(f"class_names must be a list of strings in the order of the labels, got {class_names!r}.")
    class_names = list(class_names)
    if not class_names:
        raise ValueError("class_names is empty; a classifier needs at least one class name.")
    for index, name in enumerate(class_names):
        if not isinstance(name, str):
            raise ValueError(f"class_names[{index}] is {name!r} of type {type(name).__name__}; it must be a string.")
        if not name.strip():
            raise ValueError(f"class_names[{index}] is empty; every class needs a name.")
        _check_characters(f"class_names[{index}]", name)
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f"class_names must differ from each other, but these stand there twice: {repeated[:5]}.")
    return class_names


def _check_characters(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # neither a tokenizer nor a file would take it
        raise ValueError(
            f"{what} is {text!r}, which is no text: the character at {error.start} is half of a pair of surrogates."
        ) from None


def check_label_names(label_names: Sequence[str], class_names: Sequence[str]) -> None:
    """Makes sure that the labels of a data set mean the classes of a model: label i is class i.

    A model scores any labels in range, so without this check labels in another order only show as poor accuracy.

    Args:
        label_names: what the labels 0, 1, ... of the data set are called, such as `dataset.features["label"].names`.
        class_names: the classes of the model, `model.class_names`.

    Raises:
        ValueError: if they are not the same names in the same order.

    Example:

    ```py
    >>> check_label_names(dataset.features["label"].names, model.class_names)
    ```
    """
    label_names, class_names = check_class_names(label_names), check_class_names(class_names)
    if label_names == class_names:
        return
    unknown = [name for name in label_names if name not in class_names]
    missing = [name for name in class_names if name not in label_names]
    if not unknown and not missing:
        first = next(i for i, (label, name) in enumerate(zip(label_names, class_names)) if label != name)
        raise ValueError(
            f"The data set and the model have the same classes in another order: label {first} is "
            f"{label_names[first]!r} in the data set and {class_names[first]!r} in the model. Renumber the data set "
            "with dataset.align_labels_with_mapping(model.config.label2id, 'label')."
        )
    raise ValueError(
        f"The data set's labels are not the model's classes: {len(unknown)} are unknown to the model "
        f"({unknown[:5]}), {len(missing)} of the model's are not in the data set ({missing[:5]}). Use the data set "
        "that the adapter was trained for, or give the model the data set's names with model.set_class_names(...)."
    )


def context_text(template: str) -> str:
    """The words of `template` in front of the class name: `"a photo of a"` for `"a photo of a {}."`."""
    check_template(template)
    return template.split(CLASS_SLOT)[0].strip()


def pad_template(template: str, num_virtual_tokens: int, tokenizer, start_idx: int | None = None) -> str:
    """Makes room in `template` for more virtual tokens than it has words in front of the class name.

    Placeholder words (`X`, as CoOp writes them) are put in at `start_idx`, so that the vectors, once they replace
    positions `start_idx ... start_idx + num_virtual_tokens - 1`, end right before the class name. Format the result
    with class names to get the texts for a plain `CLIPModel`. A template that has room is returned as it is.

    Args:
        template: text with one `{}`.
        num_virtual_tokens: how many token positions are to be replaced.
        tokenizer: the tokenizer of the model.
        start_idx: first replaced position; by default right behind the begin token, which is at 0 if there is one.

    Returns:
        The template, with placeholder words where they are needed.

    Raises:
        ValueError: if the tokenizer does not read a placeholder as one token, or `start_idx` lies inside a word.

    Example:

    ```py
    >>> pad_template("a photo of a {}.", 6, tokenizer)
    'X X a photo of a {}.'
    ```
    """
    context, num_begin = context_text(template), count_begin_tokens(tokenizer)
    start_idx = num_begin if start_idx is None else start_idx
    num_kept = start_idx - num_begin
    num_missing = num_kept + num_virtual_tokens - len(encode_words(context, tokenizer))
    if num_missing <= 0:
        return template
    if len(encode_words(PLACEHOLDER, tokenizer)) != 1:
        raise ValueError(
            f"This tokenizer does not read the placeholder {PLACEHOLDER!r} as one token; write a template with at "
            f"least {num_virtual_tokens} tokens in front of {{}} instead of {template!r}."
        )
    words = context.split()
    kept = next((k for k in range(len(words) + 1) if _num_tokens(words[:k], tokenizer) == num_kept), None)
    if kept is None:
        raise ValueError(
            f"start_idx={start_idx} is not the beginning of a word of {context!r}, so placeholders cannot be put "
            "there; choose another start_idx or write the placeholders into the template."
        )
    padded = words[:kept] + [PLACEHOLDER] * num_missing + words[kept:]
    slot = template.index(CLASS_SLOT)
    # a word of the template keeps its distance from the class name ("pre-{}"), a placeholder must not merge with it
    gap = template[len(template[:slot].rstrip()) : slot] if kept < len(words) else " "
    return " ".join(padded) + gap + template[slot:]


def _num_tokens(words: list[str], tokenizer) -> int:
    return len(encode_words(" ".join(words), tokenizer))


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
