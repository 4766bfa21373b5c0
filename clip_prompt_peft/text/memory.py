"""How many class prompts the text tower takes at once: as many as fit into the free memory of the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..towers import execution_device
from .chunks import autocast_state


MANY_CLASSES = 256  # on a CPU more classes than this are encoded in chunks; all devices share them between processes
CHUNK = 128
PROMPTS_AT_ONCE = 256  # on a CPU, if every image has its own prompts
COMFORTABLE = 0.5  # the share of the free memory that is used; the rest is for images, optimizer and fragments


@dataclass(frozen=True)
class TowerSize:
    """
    What the memory of a text tower depends on.

    Attributes:
        width: D, the width of the hidden states.
        inner_width: The width of the feed-forward network.
        num_layers: The number of layers.
        num_score_heads: The number of heads whose attention scores are kept, or 0 if the attention does not keep them.
        value_bytes: The mean number of bytes of a kept value: 4 in float32, 2 in half precision, 3 under autocast.
        is_trained: Whether weights of the tower are trained, such as LoRA's, besides vectors.
    """

    width: int
    inner_width: int
    num_layers: int
    num_score_heads: int = 0
    value_bytes: int = 4
    is_trained: bool = False

    @classmethod
    def of(cls, model, is_trained: bool) -> TowerSize:
        """Reads the sizes of a dual encoder's text tower from its configuration."""
        config, weight_bytes = model.config.text_config, model.text_model.dtype.itemsize
        device = execution_device(model.text_model)
        is_cast, _ = autocast_state(device).get(device.type, (False, None))
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads if model.text_model.config._attn_implementation == "eager" else 0,
            min(weight_bytes, 3) if is_cast else weight_bytes,
            is_trained,
        )


def bytes_of_class(num_tokens: float, length: int, size: TowerSize, with_gradients: bool) -> float:
    """Returns an upper bound of the activations' memory for one class.

    Args:
        num_tokens (`float`):
            The tokens that the tower computes for each class.
        length (`int`):
            The number of tokens that a token attends to at most.
        size (`TowerSize`):
            The text tower.
        with_gradients (`bool`):
            Whether all layers keep their activations for a backward pass. Otherwise, only one layer holds any.
    """
    # A layer keeps the inputs of two norms, queries, keys, values, the result of attention, and input and sigmoid of
    # the activation function. Measured: 14.0 to 15.7 widths at an inner width of 4 widths, where 16 are counted.
    kept = (8 * size.width + 2 * size.inner_width) * size.value_bytes
    if size.is_trained:
        kept *= 2  # trained weights keep the inputs of their products, too
    scores = size.num_score_heads * length * 6  # softmax in float32, and its cast to the dtype of the values
    working = 4 * (size.width + size.inner_width) * size.value_bytes  # of the layer that is being computed
    num_layers = size.num_layers if with_gradients else 0
    return num_tokens * (num_layers * (kept + scores) + working + scores)


def classes_that_fit(
    num_tokens: float, length: int, size: TowerSize, free_bytes: int, with_gradients: bool = True
) -> int:
    """Returns the number of classes, at least 1, whose activations take up a comfortable share of the free memory.

    Args:
        num_tokens, length, size, with_gradients:
            The arguments of [`bytes_of_class`].
        free_bytes (`int`):
            The free memory of the device.
    """
    return max(1, int(COMFORTABLE * free_bytes / bytes_of_class(num_tokens, length, size, with_gradients)))


def free_bytes(device: torch.device) -> int | None:
    """Returns what is free or reserved without use by torch's allocator; `None` on a CPU or where it is unknown."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + unused
