"""From class names to class embeddings: exact, and paying only for what differs between classes.

`prompts` writes the class names into the template and `tokenization` turns the texts into tokens. `encoder` puts the
other parts together: `packing` prepares the inputs of the text tower and says which way is exact for a model, `chunks`
bounds the memory of many classes and shares them over processes, and `cache` keeps the result while nothing changes.
"""

from .encoder import ClassEncoder
from .packing import normalize


__all__ = ["ClassEncoder", "normalize"]
