"""Commands that start several processes for tests."""

import socket
from pathlib import Path


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"


def torchrun(num_processes: int) -> str:
    return f"torch.distributed.run --standalone --nproc_per_node {num_processes}"


def accelerate_launch(num_processes: int) -> str:
    """Returns the arguments for `python -m` that start accelerate's launcher.

    Without MPI, `--cpu` starts a single process in spite of `--num_processes`. A configuration for GPUs starts
    several, and the workers themselves choose the CPU.
    """
    processes = f"--num_processes {num_processes} --main_process_port {free_port()}"
    return f"accelerate.commands.launch --config_file {CONFIGS / 'ddp.yaml'} {processes}"


def free_port() -> int:
    """Returns a free port: with port 0, the processes of accelerate 1.3 wait for one another forever."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
