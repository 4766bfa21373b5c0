"""Templates and class names as strings, and what a tokenizer makes of their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set


PROBE = "a photo of a cat"


DEFAULT_TEMPLATE = "a photo of a {}."


PLACEHOLDER = "X"  # the word that CoOp writes where a vector will stand


CLASS_SLOT = "{}"


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


def encode_words(text: str, tokenizer) -> list[int]:
    """Token ids of `text` without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def count_begin_tokens(tokenizer) -> int:
    """How many special tokens the tokenizer puts in front of a text: 1 for CLIP, none for SigLIP.

    Raises:
        ValueError: if it does not leave the words together.
    """
    ids, words = tokenizer(PROBE)["input_ids"], encode_words(PROBE, tokenizer)
    for start in range(len(ids) - len(words) + 1):
        if ids[start : start + len(words)] == words:
            return start
    raise ValueError(
        f"The tokenizer reads {PROBE!r} as {ids} with special tokens and as {words} without, so the positions of "
        "words are not known; prompts need a tokenizer that puts special tokens only in front of a text and behind it."
    )
