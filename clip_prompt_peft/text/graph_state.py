"""Whether the class encoder can be captured as a CUDA graph, and what a captured graph depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..towers import ADAPTER_LAYERS, drops_out, is_intercepted
from .chunks import autocast_state
from .memory import COMFORTABLE


# Modules of these only compute. Others may count calls, wait for values, or hold weights in a form of their own.
KNOWN_MODULES = ("torch.nn.", "transformers.models.", "transformers.activations", "peft.", "clip_prompt_peft.")
NOTHING_TRAINED = "nothing in the text tower is trained"
KNOWN_TENSORS = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class Facts:
    """
    What decides whether forward and backward pass can be captured. The defaults are no obstacle.

    Attributes:
        device_type: The type of the device that computes class embeddings.
        captured_type: The type of device whose work can be captured.
        num_devices: The number of devices that weights are on.
        is_transformed: Whether torch.func or forward-mode differentiation are active.
        is_watched: Whether a mode sees every operation, such as a tracer, a counter of FLOPs or anomaly detection.
        is_capturing: Whether another capture is under way on the current stream.
        num_trained: The number of tensors that are trained.
        has_hooks: Whether calls of modules are intercepted.
        has_checkpointing: Whether layers are computed again in the backward pass.
        has_dropout: Whether dropout is in effect.
        unknown_module: The class of a module that may do more than compute.
        unknown_tensor: The class of a weight that is no plain tensor.
        is_for_each_image: Whether every image has class embeddings of its own.
        is_shared: Whether processes share the classes.
        num_chunks: The number of chunks of classes.
        needed_bytes: The memory that a captured graph keeps.
        free_bytes: The free memory of the device, or `None` if it is unknown.
    """

    device_type: str = "cuda"
    captured_type: str = "cuda"
    num_devices: int = 1
    is_transformed: bool = False
    is_watched: bool = False
    is_capturing: bool = False
    num_trained: int = 1
    has_hooks: bool = False
    has_checkpointing: bool = False
    has_dropout: bool = False
    unknown_module: str | None = None
    unknown_tensor: str | None = None
    is_for_each_image: bool = False
    is_shared: bool = False
    num_chunks: int = 1
    needed_bytes: int = 0
    free_bytes: int | None = None


def obstacle_to_capture(facts: Facts) -> str | None:
    """Returns why class embeddings cannot come from a captured graph, to follow "since"; `None` if they can."""
    share = COMFORTABLE * (facts.free_bytes or 0)
    obstacles = {
        f"the text tower is on a device of type {facts.device_type!r}": facts.device_type != facts.captured_type,
        "the text tower is spread over several devices": facts.num_devices > 1,
        "a transform of torch.func or forward-mode differentiation is active": facts.is_transformed,
        "anomaly detection or a mode that sees every operation is active": facts.is_watched,
        "another capture is under way": facts.is_capturing,
        "every image has class embeddings of its own": facts.is_for_each_image,
        NOTHING_TRAINED: facts.num_trained == 0,
        "hooks take part in calls of the text tower": facts.has_hooks,
        "gradient checkpointing is on": facts.has_checkpointing,
        "dropout is in effect": facts.has_dropout,
        f"the text tower has a module of the class {facts.unknown_module}": facts.unknown_module is not None,
        f"the text tower has a weight of the class {facts.unknown_tensor}": facts.unknown_tensor is not None,
        "processes share the classes": facts.is_shared,
        f"the classes are encoded in {facts.num_chunks} chunks": facts.num_chunks > 1,
        f"it would keep {facts.needed_bytes / 2**20:,.0f} MiB, and {(facts.free_bytes or 0) / 2**20:,.0f} MiB are "
        f"free, of which {COMFORTABLE:.0%} may be used": facts.free_bytes is not None and facts.needed_bytes > share,
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)


def facts_of_modes(device: torch.device, captured_type: str) -> Facts:
    """Returns the facts that hold for this call only."""
    is_watched = torch.is_anomaly_enabled() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
    return Facts(
        device_type=device.type,
        captured_type=captured_type,
        is_transformed=torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0,
        is_watched=is_watched,
        is_capturing=device.type == "cuda" and torch.cuda.is_current_stream_capturing(),
    )


class TowerState:
    """
    The modules and tensors of some modules, as they are now. If two states are equal, what was captured in one of them
    can be replayed in the other.

    It is made in every step, so it is a flat list: comparing it costs a few microseconds, and making it about a
    microsecond for each tensor. Frozen tensors are compared by address, version, shape, strides and dtype: a captured
    graph reads them where they were. Trained ones are copied for the graph, so that only shape and dtype matter.

    Args:
        parts (`Sequence[torch.nn.Module]`):
            The modules that compute class embeddings.
        others (`Sequence[torch.Tensor]`, *optional*):
            Frozen tensors that class embeddings depend on besides.

    **Attributes**:
        - **trained** (`list[torch.Tensor]`): The tensors that require gradients, each once.
        - **frozen** (`list[torch.Tensor]`): All others.
        - **modules** (`list[torch.nn.Module]`): The modules and all below them.
        - **has_hooks** (`bool`): Whether calls of a module are intercepted.
    """

    def __init__(self, parts: Sequence[nn.Module], others: Sequence[torch.Tensor] = ()) -> None:
        self.modules: list[nn.Module] = []
        self.frozen: list[torch.Tensor] = []
        self.has_hooks = is_intercepted(parts[0])  # also by hooks for all modules
        trained: dict[int, torch.Tensor] = {}
        values: list[Any] = []
        waiting = list(parts)
        while waiting:
            module = waiting.pop()
            self.modules.append(module)
            settings = vars(module)
            if _is_adapter_layer(type(module)):
                settings = {"_disable_adapters": False, **settings}  # peft sets it when it is first changed
                # Which adapters are active, merged, scaled, ... stands in containers, which change in place.
                values += [type(v)(v) for v in settings.values() if type(v) in (dict, list, set)]
            # Dropout rates, scales, modes, ...: lists compare their entries by identity before they compare values.
            values += (module, type(module))
            values.extend(settings.values())
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in settings
            ):
                self.has_hooks = self.has_hooks or is_intercepted(module)
            for tensor in chain(module._parameters.values(), module._buffers.values()):
                if tensor is None:
                    values.append(None)
                elif tensor.requires_grad:
                    trained[id(tensor)] = tensor
                    values += (True, tensor.shape, tensor.dtype, tensor.device)
                else:
                    self.frozen.append(tensor)
                    values += (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride())
                    values += (tensor.dtype, type(tensor))
            waiting.extend(child for child in module._modules.values() if child is not None)
        for tensor in others:
            self.frozen.append(tensor)
            values += (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)
        self.trained = list(trained.values())
        self.values = [*values, self.has_hooks]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TowerState):
            return NotImplemented
        try:
            return self.values == other.values
        except (RuntimeError, TypeError, ValueError):  # a setting is a tensor or an array, and another than before
            return False

    def facts(self) -> dict[str, Any]:
        """Returns those of [`Facts`] that the modules and tensors decide."""
        tensors = [*self.trained, *self.frozen]
        modules = [f"{type(module).__module__}.{type(module).__qualname__}" for module in self.modules]
        return {
            "num_devices": len({tensor.device for tensor in tensors}),
            "num_trained": len(self.trained),
            "has_hooks": self.has_hooks,
            "has_checkpointing": any(_is_checkpointed(module) for module in self.modules),
            "has_dropout": any(drops_out(module) for module in self.modules),
            "unknown_module": next((name for name in modules if not name.startswith(KNOWN_MODULES)), None),
            "unknown_tensor": next((type(t).__name__ for t in tensors if type(t) not in KNOWN_TENSORS), None),
        }


@cache
def _is_adapter_layer(kind: type) -> bool:
    return issubclass(kind, ADAPTER_LAYERS)  # slow for abstract classes, hence kept


def _is_checkpointed(module: nn.Module) -> bool:
    return module.training and getattr(module, "gradient_checkpointing", False) is True


def numeric_settings(device: torch.device) -> tuple:
    """Returns the settings of torch that choose kernels and dtypes, which a captured graph keeps."""
    matmul, attention = torch.backends.cuda.matmul, torch.backends.cuda
    return (
        autocast_state(device),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        getattr(matmul, "fp32_precision", None) or matmul.allow_tf32,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    )
