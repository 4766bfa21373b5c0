"""The vocabulary words nearest to the learned vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..class_head import ClassHeadConfig
from ..towers import entry_of, like_table, num_rows
from ..tuner import CLIPTextLearnableEmbeddings


NUM_SAMPLED = 512  # words over which the typical distance is computed
WORDS_AT_ONCE = 64
INVALID_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class NearestWords:
    """
    The vocabulary words nearest to one learned vector. Distances are Euclidean.

    Attributes:
        position (`int`):
            The position of the vector in the text.
        class_name (`str`, *optional*):
            The class of the vector, if every class has its own vectors.
        replaced (`str`):
            The word that the vector replaces.
        words (`list[str]`):
            The words, nearest first.
        distances (`list[float]`):
            The distance of each word.
        replaced_distance (`float`):
            The distance of the word that the vector replaces.
        typical_distance (`float`):
            The median distance from a word to its nearest other word.
    """

    position: int
    class_name: str | None
    replaced: str
    words: list[str]
    distances: list[float]
    replaced_distance: float
    typical_distance: float

    @property
    def note(self) -> str:
        """A short text that says whether the nearest words are meaningful."""
        if self.distances[0] > self.typical_distance:
            return "farther from every word than words are from each other: its nearest words say little"
        if self.words[0] == self.replaced:
            return "still nearest to the word that it replaces"
        return f"as near to {self.words[0]!r} as words are to each other"


@torch.no_grad()
def nearest_words(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_words: int = 5,
    adapter_name: str | None = None,
) -> list[NearestWords]:
    """Finds the vocabulary words nearest to each vector of a prompt adapter.

    The authors of CoOp inspect their vectors this way and find few meaningful words, because training may move a
    vector far from every word. The typical distance between words tells whether it did.

    Args:
        model (`torch.nn.Module`):
            A model with a prompt adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Defaults to that of the classifier.
        num_words (`int`, *optional*, defaults to 5):
            The number of words for each vector.
        adapter_name (`str`, *optional*):
            The name of the adapter. Defaults to the active adapter.

    Returns:
        `list[NearestWords]`: One entry for each vector, grouped by class if every class has its own vectors. The list
        is empty if the adapter has no text vectors.

    Raises:
        ValueError: If there is no such prompt adapter or no tokenizer.

    Source: https://arxiv.org/abs/2109.01134, table 4.
    """
    config = getattr(model, "active_peft_config", None)
    if isinstance(config, ClassHeadConfig):  # which has learned no vectors
        return []
    layer = next((module for module in model.modules() if isinstance(module, CLIPTextLearnableEmbeddings)), None)
    if layer is None:
        raise ValueError("The model has no prompt adapter, so nothing was learned; load an adapter first.")
    name = adapter_name or layer.active_adapters[0]
    if name not in layer.prompt_configs:
        raise ValueError(f"There is no prompt adapter {name!r}; there are {sorted(layer.prompt_configs)}.")
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("The model has no tokenizer to decode words with; pass tokenizer=...")
    if name not in layer.learnable_embeddings:
        return []
    config = layer.prompt_configs[name]
    token_ids = torch.arange(num_rows(layer.token_table), device=like_table(layer.token_table).device)
    table = layer.token_table(token_ids).float()  # (V, D), with what other adapters or a quantization make of it
    is_special = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    is_special[[index for index in tokenizer.all_special_ids if index < len(table)]] = True
    vectors = entry_of(layer.learnable_embeddings, name).float()  # (n, D), or (C, n, D)
    by_class = [(None, vectors)] if vectors.ndim == 2 else zip(config.class_names, vectors)
    typical_distance = _typical_distance(table[~is_special])
    entries = []
    for class_name, class_vectors in by_class:
        for index, (replaced_id, vector) in enumerate(zip(config.replaced_token_ids, class_vectors)):
            distances = torch.cdist(vector[None], table)[0]  # (V,)
            nearest = _nearest(distances.masked_fill(is_special, torch.inf), tokenizer, num_words)
            entries.append(
                NearestWords(
                    position=config.start_idx + index,
                    class_name=class_name,
                    replaced=_word(tokenizer, replaced_id),
                    words=list(nearest.values()),
                    distances=[float(distances[token_id]) for token_id in nearest],
                    replaced_distance=float(distances[replaced_id]),
                    typical_distance=typical_distance,
                )
            )
    return entries


def describe_words(entries: Sequence[NearestWords]) -> str:
    """Formats the result of [`nearest_words`] for the terminal, one line per vector."""
    lines = []
    for entry in entries:
        of_class = f" of {entry.class_name!r}" if entry.class_name else ""
        words = ", ".join(f"{word} {distance:.2f}" for word, distance in zip(entry.words, entry.distances))
        lines.append(f"{entry.position}{of_class}, in place of {entry.replaced!r}: {words} ({entry.note})")
    return "\n".join(lines)


def _nearest(distances: torch.Tensor, tokenizer, num_words: int) -> dict[int, str]:
    """Returns the nearest words by token id, without tokens that are only a part of a UTF-8 character."""
    found = {}
    for token_id in distances.argsort().tolist():
        word = _word(tokenizer, token_id)
        if word.isprintable() and INVALID_CHARACTER not in word:
            found[token_id] = word
        if len(found) == num_words:
            break
    return found


def _typical_distance(words: torch.Tensor) -> float:
    """Returns the median distance from a row of a (V, D) table to its nearest other row, over an even sample."""
    sample = torch.linspace(0, len(words) - 1, min(NUM_SAMPLED, len(words)), device=words.device).long().unique()
    nearest = [
        torch.cdist(words[rows], words).topk(2, largest=False).values[:, 1]  # the very nearest is the row itself
        for rows in sample.split(WORDS_AT_ONCE)
    ]
    return float(torch.cat(nearest).median())


def _word(tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id]).strip()
