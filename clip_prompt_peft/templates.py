"""Prompt templates and class names as strings, and the tokens that a tokenizer makes of their words."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set

from transformers import PreTrainedTokenizerBase

from .class_names import warn_of_looks


DEFAULT_TEMPLATE = "a photo of a {}."
CLASS_SLOT = "{}"
PLACEHOLDER = "X"  # CoOp's placeholder for a virtual token
NO_WORDS = re.compile(
    r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?"  # "7", "1.0"
    r"|n\d{8}([ -].*)?"  # of WordNet: "n01440764", also in front of a name
    r"|\d+\.[^\d\s].*"  # "001.Black footed Albatross"
    r"|(class|label|category|cls|cat|target|cluster|id|idx|index)[ .#-]*\d+"
    r"|[0-9a-f]{8}-?[0-9a-f-]{8,}"  # of data bases
    r"|nan|none|null|n/?a|<na>|nat|true|false|yes|no|[?.*-]+"
    r"|unknown|unlabell?ed|unnamed|untitled|undefined|no label|no class|placeholder|dummy|todo|tbd",
    re.IGNORECASE,
)
COUNTED = re.compile(r"[a-zA-Z][ _-]?(\d+)")
PROBE = "a photo of a cat"  # a text that shows which special tokens a tokenizer adds


def check_template(template: str) -> None:
    """Raises `ValueError` unless `template` is a string with exactly one `{}`, the place of the class name."""
    if not isinstance(template, str):
        raise ValueError(f"A prompt template must be a string such as {DEFAULT_TEMPLATE!r}, got {template!r}.")
    _check_encodable("The prompt template", template)
    if template.count(CLASS_SLOT) != 1:
        raise ValueError(
            f"The prompt template {template!r} holds {{}} {template.count(CLASS_SLOT)} times; it must hold it exactly "
            f"once, where the class name goes, as in {DEFAULT_TEMPLATE!r}."
        )


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Checks class names and returns them as a list.

    Raises:
        ValueError: If the list is empty, or a name is empty, repeated, or not a valid string.
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
        _check_encodable(f"class_names[{index}]", name)
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f"class_names must differ from each other, but these stand there twice: {repeated[:5]}.")
    warn_of_looks(class_names)
    return class_names


def warn_of_names_without_words(class_names: Sequence[str]) -> None:
    """Warns (`UserWarning`) if class names look like numbers, ids or placeholders.

    It is called where names come from: when a data set is loaded, and when a classifier or a new adapter gets names.
    Python shows a warning of the same text once.
    """
    found = [name for name in class_names if NO_WORDS.fullmatch(name.strip().replace("_", " "))]
    if not found and len(class_names) > 1:
        numbered = [COUNTED.fullmatch(name.strip()) for name in class_names]  # "c0", "c1", ...
        numbers = {int(match[1]) for match in numbered if match}
        if len(numbers) == len(class_names) and numbers in (set(range(len(numbers))), set(range(1, len(numbers) + 1))):
            found = list(class_names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warnings.warn(
            f"These of the {len(class_names)} class names look like numbers, ids or placeholders: "
            f"{', '.join(map(repr, found[:3]))}{more}. CLIP reads class names as text, so give each class the words "
            "for what its images show, such as 'golden retriever'.",
            UserWarning,
            stacklevel=1,
        )


def _check_encodable(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # neither a tokenizer nor a file can hold it
        raise ValueError(
            f"{what} is {text!r}, which is no text: the character at {error.start} is half of a pair of surrogates."
        ) from None


def name_labels(config, class_names: Sequence[str] | None) -> None:
    """Sets `id2label` and `label2id` of a config of transformers; without names, to those of a config without any."""
    names = ["LABEL_0", "LABEL_1"] if class_names is None else class_names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}


def how_to_renumber(label_column: str) -> str:
    """Returns the call that renumbers the labels of a data set, for error messages."""
    return f"dataset.align_labels_with_mapping(model.config.label2id, {label_column!r})"


def check_label_names(label_names: Sequence[str], class_names: Sequence[str]) -> None:
    """Checks that label i of a data set is class i of a model.

    A model accepts any labels in range. Without this check, labels in another order only show as poor accuracy.

    Args:
        label_names (`Sequence[str]`):
            The names of the labels 0, 1, ... of the data set, such as `dataset.features["label"].names`.
        class_names (`Sequence[str]`):
            The classes of the model, `model.class_names`.

    Raises:
        ValueError: If they are not the same names in the same order.

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
            f"with {how_to_renumber('label')}."
        )
    raise ValueError(
        f"The data set's labels are not the model's classes: {len(unknown)} are unknown to the model "
        f"({unknown[:5]}), {len(missing)} of the model's are not in the data set ({missing[:5]}). Use the data set "
        "that the adapter was trained for, or give the model the data set's names with model.set_class_names(...)."
    )


def context_text(template: str) -> str:
    """Returns the words in front of the class name: `"a photo of a"` for `"a photo of a {}."`."""
    check_template(template)
    return template.split(CLASS_SLOT)[0].strip()


def pad_template(
    template: str, num_virtual_tokens: int, tokenizer: PreTrainedTokenizerBase, start_idx: int | None = None
) -> str:
    """Adds placeholder words to a template that has fewer words in front of the class name than virtual tokens.

    The placeholders (`X`, as in CoOp) are inserted at `start_idx`, so that the virtual tokens, which replace positions
    `start_idx ... start_idx + num_virtual_tokens - 1`, end right before the class name. Format the result with class
    names to get the texts for a plain `CLIPModel`. A template with enough words is returned unchanged.

    Args:
        template (`str`):
            A text with one `{}`.
        num_virtual_tokens (`int`):
            The number of token positions that are replaced.
        tokenizer:
            The tokenizer of the model.
        start_idx (`int`, *optional*):
            The first replaced position. By default the one after the begin token: 1, or 0 without a begin token.

    Returns:
        `str`: The template, with placeholders where they are needed.

    Raises:
        ValueError: If the tokenizer splits the placeholder into several tokens, or `start_idx` is inside of a word.

    Example:

    ```py
    >>> pad_template("a photo of a {}.", 6, tokenizer)
    'X X a photo of a {}.'
    ```
    """
    context, num_begin = context_text(template), count_begin_tokens(tokenizer)
    num_kept = 0 if start_idx is None else start_idx - num_begin  # tokens of the template before the first placeholder
    num_missing = num_kept + num_virtual_tokens - len(encode_words(context, tokenizer))
    if num_missing <= 0:
        return template
    if len(encode_words(PLACEHOLDER, tokenizer)) != 1:
        raise ValueError(
            f"This tokenizer does not read the placeholder {PLACEHOLDER!r} as one token; write a template with at "
            f"least {num_virtual_tokens} tokens in front of {{}} instead of {template!r}."
        )
    words = context.split()
    lengths = [len(encode_words(" ".join(words[:k]), tokenizer)) for k in range(len(words) + 1)]
    if num_kept not in lengths:
        raise ValueError(
            f"start_idx={start_idx} is not the beginning of a word of {context!r}, so placeholders cannot be put "
            "there; choose another start_idx or write the placeholders into the template."
        )
    kept = lengths.index(num_kept)
    padded = words[:kept] + [PLACEHOLDER] * num_missing + words[kept:]
    slot = template.index(CLASS_SLOT)
    # The last word keeps its distance from the class name ("pre-{}"); a placeholder must not merge with the name.
    gap = template[len(template[:slot].rstrip()) : slot] if kept < len(words) else " "
    return " ".join(padded) + gap + template[slot:]


def encode_words(text: str, tokenizer) -> list[int]:
    """Returns the token ids of `text` without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def count_begin_tokens(tokenizer) -> int:
    """Returns the number of special tokens in front of a text: 1 for CLIP, 0 for SigLIP.

    Raises:
        ValueError: If the tokenizer puts special tokens between words.
    """
    ids, words = tokenizer(PROBE)["input_ids"], encode_words(PROBE, tokenizer)
    for start in range(len(ids) - len(words) + 1):
        if ids[start : start + len(words)] == words:
            return start
    raise ValueError(
        f"The tokenizer reads {PROBE!r} as {ids} with special tokens and as {words} without, so the positions of "
        "words are not known; prompts need a tokenizer that puts special tokens only in front of a text and behind it."
    )
