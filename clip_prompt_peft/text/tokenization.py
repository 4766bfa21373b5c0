"""From texts to token ids, as the tokenizer and the text tower of each family want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..templates import PROBE, encode_words


IGNORED, MASKED, READ = "ignored", "masked", "read"


@dataclass(frozen=True)
class EncodedTexts:
    """
    Attributes:
        input_ids: (C, L)
        attention_mask: (C, L), what the text tower is to see.
        lengths: (C,) numbers of tokens without padding.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    lengths: torch.LongTensor

    @property
    def is_text(self) -> torch.BoolTensor:
        """(C, L), where there is no padding."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]


def encode_texts(texts: Sequence[str], tokenizer, max_length: int, padding: str = IGNORED) -> EncodedTexts:
    """
    Args:
        texts: C texts.
        tokenizer: of the model.
        max_length: positions of the text tower.
        padding: what the text tower makes of padding. `"ignored"`: it looks backwards only; `"masked"`: it looks both
            ways, and past it. Then texts are padded to the longest. `"read"`: padding is a part of the text, whose
            last position is pooled (SigLIP). Then all positions are filled, and masked only if the tokenizer says so.

    Raises:
        ValueError: a tokenizer that pads in front of texts.
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
    length = max(max_length, int(lengths.max()))  # whoever calls complains of texts that are too long
    encoded = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
    mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))  # (C, L)
    return EncodedTexts(encoded["input_ids"], mask, lengths)


def count_special_tokens(tokenizer) -> int:
    """How many special tokens a text has, in front and behind."""
    return len(tokenizer(PROBE)["input_ids"]) - len(encode_words(PROBE, tokenizer))


def structural_ids(tokenizer) -> torch.LongTensor:
    """The special tokens that mean something to the model: not one that only stands for unknown words."""
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "sep", "pad", "cls", "mask")}
    return torch.tensor(
        [index for index in tokenizer.all_special_ids if index in roles or index != tokenizer.unk_token_id]
    )
