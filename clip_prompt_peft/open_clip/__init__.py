"""Checkpoints in the format of open_clip, built as models of transformers in memory. open_clip is not needed for it.

`config.py` maps the configuration, `weights.py` the tensors, `processing.py` makes the tokenizer and the image
processor, and `checkpoint.py` finds all of it in a folder or on the Hub.
"""

from .checkpoint import CONFIG_FILE, OpenClipCheckpoint, find_checkpoint


__all__ = ["CONFIG_FILE", "OpenClipCheckpoint", "find_checkpoint"]
