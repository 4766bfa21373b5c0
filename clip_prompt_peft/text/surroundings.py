"""What a computation depends on beside its inputs, kept so that it can be run again."""

from __future__ import annotations

import contextlib

import torch
from torch.utils.checkpoint import get_device_states, set_device_states


class Surroundings:
    """The state of random number generators and of autocast, where it was made.

    Args:
        tensor: on the device of the computation.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device_type = tensor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)
        self.autocasts = autocast_state(tensor.device)

    @contextlib.contextmanager
    def autocast(self, cache_enabled: bool = True):
        """Autocast as it was. Without the cache, casts of weights are not kept for later use."""
        with contextlib.ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocasts.items():
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled))
            yield

    @contextlib.contextmanager
    def random_state(self):
        """The generators as they were; on leaving, as they are now."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type if self.devices else "cuda"):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield


def autocast_state(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    """For the device and the CPU: whether autocast is on, and to which dtype."""
    return {
        device_type: (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
        for device_type in {device.type, "cpu"}
        if torch.amp.is_autocast_available(device_type)
    }
