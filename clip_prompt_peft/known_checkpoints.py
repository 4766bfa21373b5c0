"""Well-known checkpoints that the classifiers load as they are, in general and for special domains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .assets import ASSETS
from .families import CLASSIFIERS
from .modeling import PromptClassificationMixin


LOADED, CONFIG, NAME = "loaded", "config", "name"  # how far a checkpoint was tried


@dataclass(frozen=True)
class KnownCheckpoint:
    """
    A checkpoint on the Hub, in the format of transformers.

    Attributes:
        id (`str`):
            Its name on the Hub.
        family (`str`):
            The name of its family, as in the column "class" of the table of families.
        domain (`str`):
            The kind of images that it was trained on.
        source (`str`):
            Where the id, and that its class loads it, was read.
        checked (`str`):
            How far it was tried here: `"loaded"` with its weights, `"config"` with random weights at its sizes, or
            `"name"`, not at all.
        licence (`str`, *optional*):
            The licence, where a model card or licence file was read. Otherwise, see its model card.
    """

    id: str
    family: str
    domain: str
    source: str
    checked: str
    licence: str | None = None

    @property
    def classifier_class(self) -> type[PromptClassificationMixin]:
        """The classifier that loads it, as [`AutoModelForPromptClassification`] finds by its config."""
        return next(one for one in CLASSIFIERS if one.family_name() == self.family)


@cache
def known_checkpoints() -> Mapping[str, KnownCheckpoint]:
    """
    Returns well-known checkpoints by their names on the Hub.

    It is a list to choose from, not a list of what works: any checkpoint of a supported family loads. Their weights
    could not be loaded where this package was built, see [`KnownCheckpoint`].

    Example:

    ```py
    >>> from clip_prompt_peft import known_checkpoints

    >>> [name for name, checkpoint in known_checkpoints().items() if "medicine" in checkpoint.domain]
    ['flaviagiammarino/pubmed-clip-vit-base-patch32', 'google/medsiglip-448']
    ```
    """
    content = json.loads((ASSETS / "known_checkpoints.json").read_text(encoding="utf-8"))
    return {name: KnownCheckpoint(name, **entry) for name, entry in content["checkpoints"].items()}
