"""All methods, all ways of sharing images and classes out, on 2 and 3 processes: how far they are from one process.

python tests/distributed_matrix.py                       # all
python tests/distributed_matrix.py coop promptsrc        # these methods only
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from distributed_cases import METHODS, Case, all_cases, alone, half_of_the_cases, replayed, run_processes
from launching import torchrun


PROCESSES = (2, 3)


def largest_differences(cases: list[Case]) -> dict[tuple[Case, int], float]:
    """Of each case on W processes, over all of them, from what one process comes to."""
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        alone_once = functools.cache(lambda method: alone(Case(method, "even", False), Path(folder)))
        for num_processes in PROCESSES:
            output_dir = Path(folder, str(num_processes))
            output_dir.mkdir()
            ranks = run_processes(torchrun(num_processes), output_dir, [case.name for case in cases], timeout=36_000)
            assert len(ranks) == num_processes
            for case in cases:
                found = [of_rank[case.name] for of_rank in ranks]
                expected = alone_once(case.method) if case.is_even else replayed(case, output_dir, found)
                differences[case, num_processes] = max(result.difference(expected) for result in found)
                print(
                    f"{case.name} on {num_processes}: {differences[case, num_processes]:.1e}",
                    file=sys.stderr,
                    flush=True,
                )
    return differences


def print_table(differences: dict[tuple[Case, int], float], field: str) -> None:
    """The largest differences by one field of the cases, number of processes, and whether classes are shared out."""
    columns = [(number, is_sharded) for number in PROCESSES for is_sharded in (False, True)]
    titles = [f"{number}, {'a share each' if is_sharded else 'all classes'}" for number, is_sharded in columns]
    print(f"\n| {field} | " + " | ".join(titles) + " |\n|" + "---|" * (len(columns) + 1))
    cells = defaultdict(list)
    for (case, number), difference in differences.items():
        cells[getattr(case, field), (number, case.is_sharded)].append(difference)
    for row in dict.fromkeys(getattr(case, field) for case, _ in differences):
        print(f"| {row} | " + " | ".join(f"{max(cells[row, column]):.0e}" for column in columns) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--all", action="store_true", help="all cases, not half of them")
    args = parser.parse_args()
    cases = all_cases() if args.all else half_of_the_cases()
    differences = largest_differences([case for case in cases if case.method in args.methods])
    for field in ("method", "sharing"):
        print_table(differences, field)


if __name__ == "__main__":
    main()
