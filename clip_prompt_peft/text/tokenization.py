"""From texts to token ids, padded and masked as the text tower of each family expects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..templates import PROBE, encode_words


IGNORED, MASKED, READ = "ignored", "masked", "read"  # how a text tower treats padding


@dataclass(frozen=True)
class EncodedTexts:
    """
    The tokens of some texts.

    Attributes:
        input_ids: (C, L).
        attention_mask: (C, L), 1 for tokens that the text tower attends to.
        lengths: (C,), the numbers of tokens without padding.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    lengths: torch.LongTensor

    @property
    def is_text(self) -> torch.BoolTensor:
        """(C, L), True for tokens that are not padding."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]


def encode_texts(texts: Sequence[str], tokenizer, max_length: int, padding: str = IGNORED) -> EncodedTexts:
    """Tokenizes and pads texts.

    Args:
        texts (`Sequence[str]`):
            C texts.
        tokenizer:
            The tokenizer of the model.
        max_length (`int`):
            The number of positions of the text tower.
        padding (`str`, *optional*, defaults to `"ignored"`):
            How the text tower treats padding. `"ignored"`: it is causal, so that padding has no effect. `"masked"`: it
            attends in both directions, with padding masked. For these two, texts are padded to the longest one.
            `"read"`: padding is part of the text, and the last position is pooled (SigLIP). Then all positions are
            filled, and masked only if the tokenizer returns a mask.

    Raises:
        ValueError: If the tokenizer pads on the left.
    """
    texts = list(texts)
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"The tokenizer pads on the {tokenizer.padding_side}, which moves the words of each text to other "
            "positions; set tokenizer.padding_side = 'right', as the text towers were trained."
        )
    if padding != READ:
        encoded = tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")
        mask = encoded["attention_mask"]  # (C, L)
        return EncodedTexts(encoded["input_ids"], mask, mask.sum(dim=1))
    lengths = torch.tensor([len(ids) for ids in tokenizer(texts)["input_ids"]])
    length = max(max_length, int(lengths.max()))  # texts that are too long are reported by the caller
    encoded = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
    mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))  # (C, L)
    return EncodedTexts(encoded["input_ids"], mask, lengths)


def count_special_tokens(tokenizer) -> int:
    """Returns the number of special tokens that the tokenizer adds to a text."""
    return len(tokenizer(PROBE)["input_ids"]) - len(encode_words(PROBE, tokenizer))


def structural_ids(tokenizer) -> torch.LongTensor:
    """Returns the special tokens with a role, without a token that only stands for unknown words."""
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "sep", "pad", "cls", "mask")}
    return torch.tensor(
        [index for index in tokenizer.all_special_ids if index in roles or index != tokenizer.unk_token_id]
    )
