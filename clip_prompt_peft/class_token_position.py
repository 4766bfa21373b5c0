"""Class names in the middle or in front of the vectors (CoOp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
