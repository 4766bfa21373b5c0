"""Seconds of a training step on 1, 2, ... processes, each encoding all classes or a share of them.

    python benchmarks/scale.py                               # C = 1000, n = 16, 1 and 2 processes
    python benchmarks/scale.py --classes 10000 --processes 1 2 4 8 --device cuda

Every process has a batch of 32 image embeddings and a DistributedDataParallel model; one thread each on a CPU (gloo),
one device each otherwise. Models have random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys

import torch
import torch.distributed as dist
from common import SIZES, add_prompts, build_classifier, print_table, synchronize, time_once
from torch.nn.parallel import DistributedDataParallel

from clip_prompt_peft.text import ClassEncoder


WAYS = {"every process encodes all classes": False, "every process encodes its share": True}


def measure(rank: int, args) -> dict[str, float]:
    """Median seconds of a step in each way, as the slowest process sees it."""
    device = "cpu" if args.device == "cpu" else f"{args.device}:{rank}"
    model = add_prompts(build_classifier(args.classes, args.size, device), args.context)
    wrapped = DistributedDataParallel(model)
    image_embeds = torch.randn(32, model.config.projection_dim, device=device)
    labels = torch.arange(32, device=device) % args.classes

    def step():
        wrapped(image_embeds=image_embeds, labels=labels).loss.backward()

    times = {way: [] for way in WAYS}
    encoders = {way: ClassEncoder(across_processes=across_processes) for way, across_processes in WAYS.items()}
    for _ in range(args.repeats + 1):
        for way, encoder in encoders.items():
            model.get_base_model().class_encoder = encoder
            dist.barrier()
            times[way].append(time_once(step, device))
    synchronize(device)
    return {way: statistics.median(values[1:]) for way, values in times.items()}


def work(args) -> None:
    if args.device == "cpu":
        torch.set_num_threads(1)
    dist.init_process_group("gloo" if args.device == "cpu" else None)
    mine = measure(dist.get_rank(), args)
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    if dist.get_rank() == 0:
        print(json.dumps({way: max(seconds[way] for seconds in of_all) for way in WAYS}))
    dist.destroy_process_group()


def launch(num_processes: int) -> dict[str, float]:
    """Starts this script over again, once for every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--worker"],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a process failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--context", type=int, default=16, help="number of vectors")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    results = {number: launch(number) for number in args.processes}
    rows = [[way, *(f"{seconds[way]:.2f} s" for seconds in results.values())] for way in WAYS]
    header = ["a step", *(f"{number} process{'es' if number > 1 else ''}" for number in results)]
    print_table(f"{args.size}, C={args.classes:,} n={args.context}, batch 32 each, {args.device}", header, rows)


if __name__ == "__main__":
    main()
