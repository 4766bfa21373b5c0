"""From class prompts to class embeddings: exact, and paying only for what differs between classes.

`encoder` puts the parts together: `paths` says which way of writing prompts into rows is exact for a model, `rows`
runs the text tower over a chunk of classes, `chunks` bounds the memory of many classes, `sharding` spreads them over
processes, and `cache` keeps the result while nothing changes.
"""

from .encoder import ClassEncoder
from .packing import normalize


__all__ = ["ClassEncoder", "normalize"]
