"""What was learned: the vocabulary words that lie next to the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..tuner import CLIPTextLearnableEmbeddings


NUM_SAMPLED = 512  # words whose distance to their nearest neighbour says what is far
ROWS_AT_ONCE = 64
NO_LETTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class NearestWords:
    """
    The vocabulary words nearest to one learned vector.

    Attributes:
        position: of the vector in the text.
        class_name: whose vector it is, if every class has its own.
        replaced: the word in whose place it stands.
        words: nearest first.
        distances: of the words, Euclidean.
        replaced_distance: of the word in whose place it stands.
        typical_distance: from a word to its nearest other word (median over the vocabulary).
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
        """How much the words say, in words."""
        if self.distances[0] > self.typical_distance:
            return "farther from every word than words are from each other: its nearest words say little"
        if self.words[0] == self.replaced:
            return "still next to the word that it replaces"
        return f"as near to {self.words[0]!r} as words are to each other"


@torch.no_grad()
def nearest_words(
    model: torch.nn.Module, tokenizer=None, num_words: int = 5, adapter_name: str | None = None
) -> list[NearestWords]:
    """The vocabulary words nearest to each vector of a prompt adapter.

    As CoOp looks at its vectors (https://arxiv.org/abs/2109.01134, table 4), whose authors found few that mean
    something: vectors are free to leave the places where words are. So each comes with a measure of how far is far.

    Args:
        model: with a prompt adapter in it.
        tokenizer: by default the classifier's.
        num_words: for each vector.
        adapter_name: by default the active one.

    Returns:
        One entry for each vector, class by class if every class has its own; none for an adapter without text vectors.

    Raises:
        ValueError: no prompt adapter, or none of that name; no tokenizer.
    """
    layer = _text_layer(model)
    name = adapter_name or layer.active_adapters[0]
    if name not in layer.prompt_configs:
        raise ValueError(f"There is no prompt adapter {name!r}; there are {sorted(layer.prompt_configs)}.")
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("Words are read from the tokenizer, and this model has none; pass tokenizer=...")
    if name not in layer.learnable_embeddings:
        return []
    config, table = layer.prompt_configs[name], layer.token_table.weight.float()  # (V, D)
    is_word = torch.ones(len(table), dtype=torch.bool, device=table.device)
    is_word[[index for index in tokenizer.all_special_ids if index < len(table)]] = False
    vectors = layer.learnable_embeddings[name].float()  # (n, D), or (C, n, D)
    by_class = [(None, vectors)] if vectors.ndim == 2 else list(zip(config.class_names, vectors))
    typical = _typical_distance(table[is_word])
    return [
        _describe(vector, index, class_name, config, table, is_word, tokenizer, num_words, typical)
        for class_name, of_class in by_class
        for index, vector in enumerate(of_class)
    ]


def describe_words(entries: Sequence[NearestWords]) -> str:
    """A table of them for the terminal."""
    lines = []
    for entry in entries:
        of_class = f" of {entry.class_name!r}" if entry.class_name else ""
        words = ", ".join(f"{word} {distance:.2f}" for word, distance in zip(entry.words, entry.distances))
        lines.append(f"{entry.position}{of_class}, in place of {entry.replaced!r}: {words} ({entry.note})")
    return "\n".join(lines)


def _describe(vector, index, class_name, config, table, is_word, tokenizer, num_words, typical) -> NearestWords:
    distances = torch.cdist(vector[None], table)[0]  # (V,)
    replaced_id = config.replaced_token_ids[index]
    words = _nearest(distances.masked_fill(~is_word, torch.inf), tokenizer, num_words)
    return NearestWords(
        position=config.start_idx + index,
        class_name=class_name,
        replaced=_word(tokenizer, replaced_id),
        words=[word for word, _ in words],
        distances=[distance for _, distance in words],
        replaced_distance=float(distances[replaced_id]),
        typical_distance=typical,
    )


def _nearest(distances: torch.Tensor, tokenizer, num_words: int) -> list[tuple[str, float]]:
    """Words and distances, nearest first, without the pieces of letters that the vocabulary of bytes holds too."""
    found: list[tuple[str, float]] = []
    for token_id in distances.argsort().tolist():
        word = _word(tokenizer, token_id)
        if word.isprintable() and NO_LETTER not in word:
            found.append((word, float(distances[token_id])))
        if len(found) == num_words:
            break
    return found


def _typical_distance(words: torch.Tensor) -> float:
    """Median distance from a row of (V, D) to its nearest other row, over rows spread evenly."""
    sampled = torch.linspace(0, len(words) - 1, min(NUM_SAMPLED, len(words)), device=words.device).long().unique()
    nearest = [
        torch.cdist(words[rows], words).topk(2, largest=False).values[:, 1] for rows in sampled.split(ROWS_AT_ONCE)
    ]  # the very nearest is the row itself
    return float(torch.cat(nearest).median())


def _word(tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id]).strip()


def _text_layer(model) -> CLIPTextLearnableEmbeddings:
    layers = [module for module in model.modules() if isinstance(module, CLIPTextLearnableEmbeddings)]
    if not layers:
        raise ValueError("There is no prompt adapter in the model, so nothing was learned; load one first.")
    return layers[0]
