"""Quantized base models: whether gradients reach the prompts in front of their layers."""

from __future__ import annotations

import torch
from torch import nn

from ..towers import is_quantized


def keep_trainable(model: nn.Module) -> None:
    """Keeps 4-bit layers of bitsandbytes as they are in evaluation.

    On CPUs with certain instructions, their first call in eval mode packs the weights anew, with rounded scales, for a
    kernel that passes no gradient: after an evaluation, no training would be possible, and other values be saved.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def check_passes_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Tries one quantized layer of each kind.

    Args:
        model (`torch.nn.Module`):
            The base model.
        dtype (`torch.dtype`):
            The precision of its activations.

    Raises:
        ValueError: If a layer passes no gradient. Vectors would not be trained, without any other sign of it.
    """
    tried = set()
    for path, module in model.named_modules():
        size = getattr(module, "in_features", None)
        kind = type(module), type(getattr(module, "weight", None))
        if size is None or kind in tried or not is_quantized(module):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not tensors or any(tensor.is_meta for tensor in tensors):
            continue
        tried.add(kind)
        problem = _problem_of(module, torch.ones(1, size, dtype=dtype, device=tensors[0].device))
        if problem is not None:
            raise ValueError(
                f"The quantized layer {path!r} ({type(module).__module__}.{type(module).__name__}, its weight a "
                f"{kind[1].__name__}) {problem}, so prompts in front of it could not be trained. Quantize the weights "
                "only, not the activations (BitsAndBytesConfig, or Int8WeightOnlyConfig of torchao). If it is a 4-bit "
                "layer that was evaluated on a CPU before, load the model again and put the adapter in first."
            )


def _problem_of(module: nn.Module, inputs: torch.Tensor) -> str | None:
    inputs.requires_grad_()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            outputs = module(inputs)
            gradient = None
            if outputs.requires_grad:  # perhaps by a bias alone
                (gradient,) = torch.autograd.grad(outputs.sum(), inputs, allow_unused=True)
    except RuntimeError as error:
        return f"fails in training ({error})"
    return None if gradient is not None and bool(gradient.any()) else "passes no gradient"
