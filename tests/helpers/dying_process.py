"""A process of a distributed training dies or stands still; what becomes of the others.

dying_process.py SECONDS WAY...   prints, as JSON, how the other two processes ended, for each way and with classes
shared out or not. `SECONDS` is the timeout of the process group.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from distributed_cases import Case, RecordingTrainer, make_trainer
from launching import free_port
from transformers import TrainerCallback


NUM_PROCESSES, VICTIM, STEP = 3, 1, 2
FAR_TOO_LONG = 120  # seconds after which a process counts as hanging


def raise_error():
    raise OSError("a picture could not be read")


WAYS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stands still": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": raise_error,
}


class Death(TrainerCallback):
    def __init__(self, way: str) -> None:
        self.way = way

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEP and args.process_index == VICTIM:
            WAYS[self.way]()


def train(rank: int, port: int, way: str, is_sharded: bool, timeout: int, log: str) -> None:
    """One process of the training."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_PROCESSES), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # TrainingArguments(ddp_timeout=...) has no effect together with use_cpu
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    trainer = make_trainer(Case("coop", "even", is_sharded), RecordingTrainer, Path(log).parent, NUM_PROCESSES)
    trainer.add_callback(Death(way))
    trainer.train()


def end_of_others(way: str, is_sharded: bool, timeout: int, folder: str) -> list[dict]:
    """Exit code and last line of each process but the one that dies. `None` is the code of one that hangs."""
    port, context = free_port(), multiprocessing.get_context("fork")  # forked, they need not import everything again
    logs = [str(Path(folder, f"{rank}.log")) for rank in range(NUM_PROCESSES)]
    arguments = [(rank, port, way, is_sharded, timeout, log) for rank, log in enumerate(logs)]
    processes = [context.Process(target=train, args=of_process) for of_process in arguments]
    for process in processes:
        process.start()
    ends = []
    for rank, process in enumerate(processes):
        if rank != VICTIM:
            process.join(FAR_TOO_LONG)
            ends.append({"exit code": process.exitcode, "last line": Path(logs[rank]).read_text().splitlines()[-1]})
    for process in processes:
        process.kill()
        process.join()
    return ends


if __name__ == "__main__":
    timeout, *ways = sys.argv[1:]
    results = {}
    for way in ways:
        for is_sharded in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                ends = end_of_others(way, is_sharded, int(timeout), folder)
            results[f"{way}, {'shares' if is_sharded else 'all'}"] = ends
    print(json.dumps(results))
