"""The output folder of the command `train`: one sub-folder for each seed, and the record of what is in it.

`OUT/seed1`, `OUT/seed2`, ... hold an adapter each, and `OUT/results.json` the results. Beside each adapter lies a
record of the training and of its test images, so that an adapter is not replaced by one of another training unnoticed,
and the command `report` finds the test images again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

from peft.utils import CONFIG_NAME
from transformers import TrainingArguments

from ..training.checkpoints import checkpoints_in
from ..tuner.files import adapter_folders
from .arguments import RECIPE_ARGUMENTS, DataTrainingArguments, ModelArguments, PromptArguments
from .data import DataArguments


# The record holds paths of this machine. The Trainer pushes no file whose name starts with an underscore, and
# `push_to_hub` of the model pushes only files of its own.
RECORD_NAME = "_training.json"
# Arguments of the Trainer that change what is learned.
TRAINING_SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "load_best_model_at_end",
    "metric_for_best_model",
)


def runs_in(output_dir: str, training_args: TrainingArguments, num_seeds: int) -> list[TrainingArguments]:
    """Returns the training arguments of every seed, each with a folder of its own."""
    hub_model_id = training_args.hub_model_id or os.path.basename(os.path.abspath(output_dir))
    return [
        replace(
            training_args, seed=seed, output_dir=os.path.join(output_dir, f"seed{seed}"), hub_model_id=hub_model_id
        )
        for seed in range(training_args.seed, training_args.seed + num_seeds)
    ]


def record_of(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    prompt_args: PromptArguments,
    training_args: TrainingArguments,
    given: set[str],
) -> dict[str, dict]:
    """Returns what distinguishes a training from others, as JSON. Seeds are left out, and so are all tokens.

    What the recipe chooses is left out as well, unless its name is in `given`, the names of the user's arguments.
    """
    drawing = {"shots": data_args.shots, "when_fewer": data_args.when_fewer, "augment": data_args.augment}
    if data_args.calibrate:  # records of earlier versions do not have it
        drawing["calibrate"] = True
    model = {name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision")}
    training, chosen = training_args.to_dict(), {*RECIPE_ARGUMENTS} - given
    record = {
        "data": data_args.as_record(),
        "settings": {**model, **drawing, **vars(prompt_args)},
        "training": {name: training[name] for name in TRAINING_SETTINGS if name not in chosen},
    }
    return json.loads(json.dumps(record))


def run_of(args: TrainingArguments) -> dict[str, float]:
    """Returns what the report shows of a run and [`record_of`] leaves out: the seed, and what the recipe chose."""
    return {"Seed": args.seed, "Epochs": args.num_train_epochs, "Learning rate": args.learning_rate}


def read_record(adapter: str) -> dict | None:
    """Returns the record beside an adapter, or `None` if there is none."""
    try:
        record = json.loads(Path(adapter, RECORD_NAME).read_text(encoding="utf-8"))
        known = DataArguments(**record["data"]) if isinstance(record["test"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of another version
        return None
    return record if known is not None else None


def write_record(adapter: str, record: dict) -> None:
    """Writes the record into the folder of an adapter."""
    os.makedirs(adapter, exist_ok=True)
    Path(adapter, RECORD_NAME).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def check_nothing_is_replaced(output_dir: str, record: dict[str, dict], training_args: TrainingArguments) -> None:
    """Checks that an output folder holds no adapters of another training.

    Args:
        output_dir (`str`):
            The folder, which does not have to exist.
        record (`dict`):
            The result of [`record_of`] for the training that is about to start.
        training_args (`TrainingArguments`):
            Its arguments.

    Raises:
        ValueError: If it holds some, and `--overwrite_output_dir` is not given.
    """
    how = "Choose another --output_dir, or add --overwrite_output_dir to replace them."
    if os.path.isfile(os.path.join(output_dir, CONFIG_NAME)):
        raise ValueError(
            f"{output_dir!r} is an adapter itself, and this command writes adapters to sub-folders, such as "
            f"{os.path.join(output_dir, 'seed1')!r}. Choose another --output_dir."
        )
    if training_args.overwrite_output_dir:
        if training_args.resume_from_checkpoint is not None:
            raise ValueError("--overwrite_output_dir removes the checkpoints that --resume_from_checkpoint asks for.")
        return
    for adapter in adapter_folders(output_dir):
        known = read_record(adapter)
        if known is None:
            raise ValueError(f"{adapter!r} holds an adapter of an unknown training. {how}")
        parts = ["data", "settings"] if training_args.resume_from_checkpoint is not None else list(record)
        differences = [
            f"--{name} {_shown(known[part].get(name))} there, {_shown(record[part].get(name))} here"
            for part in parts
            for name in {**known.get(part, {}), **record[part]}
            if known[part].get(name) != record[part].get(name)
        ]
        if differences:
            raise ValueError(f"{adapter!r} holds an adapter of another training ({'; '.join(differences[:4])}). {how}")


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)


def remove_earlier(output_dir: str) -> None:
    """Removes the adapters and checkpoints of an earlier training, for `--overwrite_output_dir`."""
    for folder in sorted(Path(output_dir).glob("seed*")):
        if (folder / CONFIG_NAME).is_file() or checkpoints_in(folder):
            print(f"Removed {folder} of an earlier training")
            shutil.rmtree(folder)


def check_can_be_written(folder: str, name: str = "--output_dir") -> None:
    """Raises `ValueError` if files cannot be written into a folder. It is not left behind if it did not exist."""
    missing = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder!r} cannot be written ({error.strerror}); choose another.") from None
    finally:
        remove_if_empty(*missing)


def remove_if_empty(*folders: str | os.PathLike) -> None:
    """Removes those of the folders, the inner ones first, that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


@contextlib.contextmanager
def no_empty_folders(output_dir: str) -> Iterator[None]:
    """Removes the output folders that are still empty if an error ends the body."""
    try:
        yield
    except BaseException:
        remove_if_empty(*Path(output_dir).glob("seed*"), output_dir)
        raise
