"""Kills the command `train` again and again, continues it, and compares the result with an uninterrupted training.

    python tests/helpers/kill_and_resume.py --kills 200

A training is killed (SIGKILL) at random moments, and at random function calls while a checkpoint or the result is
written. After each kill it is continued with `--resume_from_checkpoint true`, until it is finished. Its vectors must
then equal those of an uninterrupted training bit for bit; otherwise the exit code is 1.

All trainings are forks of this process, which has imported everything already.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from transformers import Trainer  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from clip_prompt_peft import PeftModelForPromptClassification  # noqa: E402
from clip_prompt_peft.training.checkpoints import checkpoint_damage, checkpoints_in  # noqa: E402


MODULE = "clip_prompt_peft.commands.train"
COMMON = ["--num_seeds", "1", "--save_strategy", "epoch", "--disable_tqdm", "true", "--output_dir", "out"]
TRAININGS = {
    "short": ["--num_train_epochs", "3", "--shots", "2"],
    "AdamW": ["--num_train_epochs", "8"],
    "PromptSRC": ["--method", "promptsrc", "--num_train_epochs", "3", "--per_device_train_batch_size", "32"],
    "augmented": ["--num_train_epochs", "3", "--shots", "4", "--augment"],
}
SAVING = (Trainer._save_checkpoint.__code__, PeftModelForPromptClassification.save_pretrained.__code__)


@dataclass
class Counts:
    """Counts of what happened."""

    kills: int = 0
    kills_while_saving: int = 0
    half_checkpoints: int = 0  # left by a kill
    taken_by_transformers: int = 0  # those that get_last_checkpoint would have continued
    files: collections.Counter = field(default_factory=collections.Counter)  # in a half checkpoint
    finished: int = 0
    lost: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS)[1:])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counts()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        references = {name: Reference(name, Path(folder) / f"whole {name}") for name in args.trainings}
        while counts.kills < args.kills or not counts.finished:
            kill_until_finished(references[rng.choice(args.trainings)], Path(folder) / "killed", rng, counts)
    print(json.dumps(vars(counts) | {"files": dict(sorted(counts.files.items()))}))
    sys.exit(counts.lost > 0)


class Reference:
    """An uninterrupted training: its seconds, its number of calls while saving, and its result."""

    def __init__(self, name: str, folder: Path) -> None:
        self.arguments = [*COMMON, *TRAININGS[name]]
        start = time.monotonic()
        run(self.arguments, folder)
        self.seconds = time.monotonic() - start
        shutil.rmtree(folder)
        assert run(self.arguments, folder, count_calls=True) == 0, (folder / "log").read_text()
        self.num_calls = int((folder / "calls").read_text())
        self.result = result_of(folder)


def result_of(folder: Path) -> tuple[bytes, bytes]:
    return tuple(
        (folder / "out/seed1" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    )


def kill_until_finished(reference: Reference, folder: Path, rng: random.Random, counts: Counts) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    while True:
        while_saving = rng.random() < 0.6
        moment = (
            {"die_at_call": rng.randrange(reference.num_calls)}
            if while_saving
            else {"seconds": rng.uniform(0, 1.1 * reference.seconds)}
        )
        code = run([*reference.arguments, "--resume_from_checkpoint", "true"], folder, **moment)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (folder / "log").read_text()
        counts.kills += 1
        counts.kills_while_saving += while_saving
        look_at_last_checkpoint(folder / "out/seed1", counts)
    counts.finished += 1
    counts.lost += result_of(folder) != reference.result


def look_at_last_checkpoint(out: Path, counts: Counts) -> None:
    checkpoints = checkpoints_in(out)
    if checkpoints and checkpoint_damage(checkpoints[-1]) is not None:
        counts.half_checkpoints += 1
        counts.taken_by_transformers += get_last_checkpoint(out) == checkpoints[-1]
        counts.files[len(os.listdir(checkpoints[-1]))] += 1


def run(
    arguments: list[str],
    folder: Path,
    seconds: float | None = None,
    die_at_call: int | None = None,
    count_calls: bool = False,
) -> int:
    """Runs the command in a fork.

    Args:
        arguments (`list[str]`):
            The arguments of the command.
        folder (`Path`):
            The working directory.
        seconds (`float`, *optional*):
            The time after which the process is killed.
        die_at_call (`int`, *optional*):
            The number of the call, counted while something is saved, at which the process is killed.
        count_calls (`bool`, *optional*, defaults to `False`):
            Whether to write the number of those calls to the file `calls`.

    Returns:
        `int`: The exit code, negative for a signal.
    """
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        counter = CallsWhileSaving(die_at_call)
        sys.argv = ["train", *arguments]
        code = 1
        try:
            if die_at_call is not None or count_calls:
                sys.setprofile(counter)
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.setprofile(None)
        Path("calls").write_text(str(counter.calls))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


class CallsWhileSaving:
    """A profiler that counts the calls of functions while something is saved, and kills the process at one of them."""

    def __init__(self, die_at_call: int | None) -> None:
        self.die_at_call, self.calls, self.depth = die_at_call, 0, 0

    def __call__(self, frame, event, arg) -> None:
        if frame.f_code in SAVING and event in ("call", "return"):
            self.depth += 1 if event == "call" else -1
        if self.depth > 0 and event in ("call", "c_call", "c_return"):
            if self.calls == self.die_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1


if __name__ == "__main__":
    main()
