"""Memory and seconds of a training step against the number of classes.

    python benchmarks/memory.py                              # C = 100, 1000, 10000, n = 16
    python benchmarks/memory.py --classes 1000 --context 4 --device cuda

Each row of the table is a process of its own; the memory is the highest that it ever held, less what it held before
the first step (model, prompts, image embeddings). Models have random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys

import torch
from common import SIZES, add_prompts, build_classifier, print_table, time_once


MIB = 2**20
# path and batch size of the encoder
WAYS = {
    "C: cut after the longest prompt, all classes at once": ("cut", None),
    "packed rows, all classes at once": ("packed", None),
    "ours: packed rows, in chunks beyond 256 classes": ("auto", "auto"),
}
# Beyond this, all classes at once would need tens of GiB.
MOST_AT_ONCE = 1000


def measure(way: str, num_classes: int, num_vectors: int, repeats: int, size: str, device: str) -> dict[str, float]:
    """Median seconds of a step, and MiB above what was there before."""
    model = add_prompts(build_classifier(num_classes, size, device), num_vectors)
    encoder = model.get_base_model().class_encoder
    encoder.path, encoder.batch_size = WAYS[way]
    image_embeds = torch.randn(32, model.config.projection_dim, device=device)
    labels = torch.arange(32, device=device) % num_classes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(image_embeds=image_embeds, labels=labels).loss.backward()
        optimizer.step()

    _ = model.get_base_model().class_prompts
    before = reset_peak(device)
    first = time_once(step, device)
    seconds = [time_once(step, device) for _ in range(repeats)] or [first]
    return {"seconds": statistics.median(seconds), "mib": (peak(device) - before) / MIB}


def reset_peak(device: str) -> int:
    """Bytes held now."""
    if device != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()
        return torch.get_device_module(device).memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the kernel forgets the highest value so far
    return peak(device)


def peak(device: str) -> int:
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_in_process(*arguments) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--context", type=int, default=16, help="number of vectors")
    parser.add_argument("--repeats", type=int, default=1, help="steps after the first, which is not counted")
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = []
    for way, (_, batch_size) in WAYS.items():
        rows.append([way])
        for num_classes in args.classes:
            if batch_size is None and num_classes > MOST_AT_ONCE:
                rows[-1].append("-")
                continue
            result = measure_in_process(way, num_classes, args.context, args.repeats, args.size, args.device)
            rows[-1].append(f"{result['seconds']:.2f} s, {result['mib']:,.0f} MiB")
    header = [f"n={args.context}", *(f"C={num_classes:,}" for num_classes in args.classes)]
    print_table(f"{args.size}, float32, {args.device}, {torch.get_num_threads()} thread(s)", header, rows)


if __name__ == "__main__":
    main()
