"""Kills examples/run_prompt_tuning.py again and again, continues it, and compares what it ends with.

    python tests/kill_and_resume.py --kills 200

A training is killed (SIGKILL) at random moments, and at random function calls while a checkpoint or the result is
written. After each kill it is continued by `--resume_from_checkpoint true`, until it comes to its end; its vectors
must then be those of a training that was left in peace, bit for bit. The exit code is 1 if any is not.

The processes are forks of this one, which has imported everything already.
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


EXAMPLES = Path(__file__).parents[2] / "examples"
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
    """What happened."""

    kills: int = 0
    kills_while_saving: int = 0
    half_checkpoints: int = 0  # left by a kill
    taken_by_transformers: int = 0  # of these: what get_last_checkpoint would have continued
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
    sys.path.insert(0, str(EXAMPLES))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        references = {name: Reference(name, Path(folder) / f"whole {name}") for name in args.trainings}
        while counts.kills < args.kills or not counts.finished:
            kill_until_finished(references[rng.choice(args.trainings)], Path(folder) / "killed", rng, counts)
    print(json.dumps(vars(counts) | {"files": dict(sorted(counts.files.items()))}))
    sys.exit(counts.lost > 0)


class Reference:
    """A training that is left in peace: how long it takes, how many calls it makes while saving, how it ends."""

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
    return tuple((folder / "out" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json"))


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
        look_at_last_checkpoint(folder / "out", counts)
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
    """Runs the example in a fork.

    Args:
        arguments: of the example.
        folder: to run it in.
        seconds: after which to kill it.
        die_at_call: how many calls it makes while saving before it is killed.
        count_calls: whether to leave the number of those calls in the file `calls`.

    Returns:
        The exit code, negative for a signal.
    """
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        counter = CallsWhileSaving(die_at_call)
        sys.argv = [str(EXAMPLES / "run_prompt_tuning.py"), *arguments]
        code = 1
        try:
            if die_at_call is not None or count_calls:
                sys.setprofile(counter)
            runpy.run_path(sys.argv[0], run_name="__main__")
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
    """A profiler that counts the calls of Python and C functions made while something is saved, and kills at one."""

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
