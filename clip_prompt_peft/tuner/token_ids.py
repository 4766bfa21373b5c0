"""The token ids that the tokenizer of the training made of an adapter's own texts, which tell another tokenizer.

Two tokenizers of the same size can number the same words in other ways. The texts are the class names in the adapter's
template or, where no class names are known, one word in it.
"""

from __future__ import annotations

import base64
import binascii
import warnings
import zlib

import torch

from ..templates import CLASS_SLOT
from .config import CLIPPromptTuningConfig
from .fingerprint import is_of_later_version


VERSION = 1
STAND_IN = "cat"  # for the class name
MAX_TEXTS = 1000  # whose ids are kept; of further ones only a checksum is
MAX_BYTES = 2**24  # of the ids of all texts
END = -1  # after the ids of each text


def texts_of(config: CLIPPromptTuningConfig) -> list[str]:
    """Returns the texts of a resolved configuration."""
    return [config.padded_template.replace(CLASS_SLOT, name) for name in config.class_names or [STAND_IN]]


def token_ids_of(config: CLIPPromptTuningConfig, tokenizer) -> list[list[int]]:
    """Returns the token ids of each text of a resolved configuration, special tokens included."""
    return tokenizer(texts_of(config))["input_ids"]


def record_token_ids(config: CLIPPromptTuningConfig, tokenizer) -> list[list[int]]:
    """Sets `tokenizer_fingerprint` of a resolved configuration, and returns the ids of its texts."""
    ids = token_ids_of(config, tokenizer)
    config.tokenizer_fingerprint = {
        "version": VERSION,
        "texts": _checksum(texts_of(config)),
        "checksum": _checksum(ids),
        "ids": base64.b64encode(zlib.compress(_joined(ids[:MAX_TEXTS]), 9)).decode(),
    }
    config.checked_tokenizer = id(tokenizer)
    return ids


def check_token_ids(config: CLIPPromptTuningConfig, tokenizer) -> None:
    """Warns (`UserWarning`), once, if a tokenizer makes other token ids of an adapter's texts than in the training.

    Args:
        config (`CLIPPromptTuningConfig`):
            The resolved configuration of the adapter. Nothing is compared if it records no token ids, or if its
            template or its class names were changed since.
        tokenizer:
            The tokenizer that writes its prompts.

    Raises:
        ValueError: If the record is damaged.
    """
    record = config.tokenizer_fingerprint
    if record is None or config.checked_tokenizer == id(tokenizer):
        return
    config.checked_tokenizer = id(tokenizer)
    if is_of_later_version(record, VERSION, "tokenizer_fingerprint", config.described, "the tokenizer is"):
        return
    recorded = _decode(record)
    texts = texts_of(config)
    if record["texts"] != _checksum(texts):
        return
    now = token_ids_of(config, tokenizer)
    if record["checksum"] == _checksum(now):
        return
    differing = [i for i, (before, ids) in enumerate(zip(recorded, now)) if before != ids]
    if differing:
        first = differing[0]
        found = f"{texts[first]!r} had the token ids {recorded[first]}, and has {now[first]} now"
        found += f", and {len(differing) - 1} more texts have others" if len(differing) > 1 else ""
    else:
        found = f"one of the texts after the first {len(recorded)} has other token ids now"
    warnings.warn(
        f"The adapter {config.described} was trained with another tokenizer than this one "
        f"({getattr(tokenizer, 'name_or_path', '') or 'no name'}): {found}. Its predictions will be worse than they "
        "were; load the tokenizer of its base model.",
        UserWarning,
        stacklevel=2,
    )


def _checksum(values: list) -> str:
    return f"{zlib.crc32(repr(values).encode()):08x}"


def _joined(ids: list[list[int]]) -> bytes:
    joined = [token for of_text in ids for token in (*of_text, END)]
    return torch.tensor(joined, dtype=torch.int32).numpy().astype("<i4").tobytes()


def _decode(record: dict) -> list[list[int]]:
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(record["ids"], validate=True), MAX_BYTES)
        texts: list[list[int]] = [[]]
        for token in torch.frombuffer(bytearray(data), dtype=torch.int32).tolist():
            if token == END:
                texts.append([])
            else:
                texts[-1].append(token)
        if not all(isinstance(record[name], str) for name in ("texts", "checksum")) or texts.pop():
            raise ValueError("there are ids without an end, or no checksums")
        return texts
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(
            f"tokenizer_fingerprint is damaged ({type(error).__name__}: {error}); download or save the adapter again."
        ) from error
