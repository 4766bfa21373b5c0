"""The same tuning written three ways: by hand as in CoOp's research code, with peft alone, and with this library.

    python benchmarks/side_by_side.py

Runs the programs in benchmarks/side_by_side, each a process of its own, and prints their lines, seconds, accuracy, and
the bytes of what they save. Same pictures, start, optimizer and epochs; the order of the pictures differs.
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_table


FOLDER = Path(__file__).resolve().parent / "side_by_side"
PROGRAMS = {
    "coop_style": "by hand, as CoOp's code",
    "peft_alone": "peft alone (TrainableTokens)",
    "ours": "this library",
}
WEIGHTS = (".pt", ".safetensors")


def count_lines(source: str) -> int:
    """Lines with code: no empty ones, comments or docstrings."""
    tree = ast.parse(source)
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and is_text(node.value)]
    skipped = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in skipped for i, line in lines)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def run(program: str, device: str) -> tuple[float, float, int]:
    """Seconds of the whole process, accuracy, and bytes of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        # no caches of earlier runs: every run computes its image embeddings
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        environment["DEVICE"] = device
        if device == "cpu":  # the Trainer would take a card that it sees
            environment["CUDA_VISIBLE_DEVICES"] = ""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", FOLDER / f"{program}.py", folder],
            capture_output=True,
            text=True,
            env=environment,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        saved = sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix in WEIGHTS)
    return seconds, float(done.stdout.splitlines()[-1]), saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the card that the Trainer takes")
    args = parser.parse_args()
    results = {program: [] for program in PROGRAMS}
    for _ in range(args.repeats):
        for program in PROGRAMS:  # in turn, so that a busy moment hits all alike
            results[program].append(run(program, args.device))
    rows = []
    for program, runs in results.items():
        seconds, (_, accuracy, saved) = statistics.median(run[0] for run in runs), runs[-1]
        lines = count_lines((FOLDER / f"{program}.py").read_text(encoding="utf-8"))
        rows.append([PROGRAMS[program], str(lines), f"{seconds:.1f}", f"{saved:,}", f"{accuracy:.1%}"])
    print_table(
        f"The whole program, imports included, {args.device}",
        ["", "lines", "seconds", "bytes saved", "accuracy"],
        rows,
    )


if __name__ == "__main__":
    main()
