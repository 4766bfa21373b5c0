"""Embeddings of complete texts, several for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..towers import execution_device, num_positions


TEXTS_AT_ONCE = 256


def text_features(model, texts: Mapping[str, Sequence[str]]) -> torch.Tensor:
    """Returns the embeddings (C, T, E), not normalized, of T texts for each of C classes.

    Args:
        model (`PromptClassificationMixin`):
            The classifier.
        texts (`Mapping[str, Sequence[str]]`):
            The texts of each class by its name, as many for each.

    Raises:
        ValueError: If a text is too long for the text tower.
    """
    features = features_of_texts(model, [text for of_class in texts.values() for text in of_class])  # (C T, E)
    return features.unflatten(0, (len(texts), -1))


def features_of_texts(model, texts: Sequence[str], class_name: str | None = None) -> torch.Tensor:
    """Returns the embeddings (T, E), not normalized, of T texts, about a class if it is given.

    Raises:
        ValueError: If a text is too long for the text tower.
    """
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    return torch.cat([_encode(model, texts[start : start + TEXTS_AT_ONCE], class_name) for start in starts])


def _encode(model, texts: Sequence[str], class_name: str | None) -> torch.Tensor:
    encoded, max_length = model.encode_texts(texts), num_positions(model.text_embeddings)
    longest = int(encoded.lengths.max())
    if longest > max_length:
        about = "" if class_name is None else f" about {class_name!r}"
        raise ValueError(
            f"A text{about} has {longest} tokens, but the text tower has {max_length} positions; shorten "
            f"{texts[int(encoded.lengths.argmax())]!r}."
        )
    device = execution_device(model.text_model)
    input_ids, attention_mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
    return model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
