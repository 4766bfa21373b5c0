"""From class prompts to class embeddings: exact, and paying only for what differs between classes.

`encoder` puts the parts together; `paths` says which of them are exact for a model; `rows` runs the text tower over
one chunk of classes, one prompt a row or packed; `chunks` bounds the memory of many classes; `sharding` spreads them over processes; `cache`
keeps the result while nothing changes.
"""

from .encoder import ClassEncoder
from .rows import normalize


__all__ = ["ClassEncoder", "normalize"]
