"""Functions for the tests of the commands."""

import os
import subprocess
import sys

from conftest import EMOJI

from clip_prompt_peft.data import load_image_dataset


def environment(more=None):
    """Returns the environment for a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(more or {})}


def run_command(command, *arguments, folder, env=None):
    """Runs a command in a process of its own and returns its exit code, output and errors."""
    done = subprocess.run(
        [sys.executable, "-m", f"clip_prompt_peft.commands.{command}", *map(str, arguments)],
        cwd=folder,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def write_image_folder(folder, classes, num_images, split="train"):
    """Writes a folder of emoji with sub-folders whose names have an underscore."""
    dataset = load_image_dataset(files={"train": str(EMOJI / f"noto-{split}.parquet")})["train"]
    names = dataset.features["label"].names
    for index, label in enumerate(dataset["label"]):
        target = folder / f"{names[label]}_emoji"
        if names[label] in classes and len(list(target.glob("*"))) < num_images:
            target.mkdir(parents=True, exist_ok=True)
            dataset[index]["image"].save(target / f"{index}.png")
    return folder
