"""Trainings that must come out alike on any number of processes.

distributed_cases.py OUTPUT_DIR CASE...   what each process runs: all these cases, one after the other.

What W processes should come to is written down in two ways:
  - `alone`: one process on the same global batches, where every process had as many images as the others;
  - `replayed`: one process that is given, one after the other, the very batches that all processes had, as the
    steps of one accumulation. That also holds for last batches filled up, or cut short, differently on each process.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from clip_prompt_peft import (
    PRESETS,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    GaussianPromptAveraging,
    ProGradMixin,
)
from clip_prompt_peft.assets import TINY_CLIP


NAMES = ["cat", "red car", "old wooden house", "food", "arrow", "hand with a pen", "clock"]  # no multiple of 2 or 3
GLOBAL_BATCH = 12

# How the images are shared out: their number, the steps of an accumulation, settings of accelerate's data loader.
SHARING = {
    "even": (24, 1, {}),
    "accumulation": (24, 2, {}),
    "uneven": (17, 1, {}),  # accelerate fills the last batch up
    "uneven-accumulation": (17, 2, {}),
    "dispatch": (17, 1, {"dispatch_batches": True}),
    "even_batches=False": (23, 1, {"even_batches": False}),  # each process has as many batches, not as many images
    "even_batches=False-accumulation": (23, 2, {"even_batches": False}),
}
NUM_EVALUATED, EVAL_BATCH = 24, 4  # six batches: as many for each of 1, 2 or 3 processes


# What is trained: all presets but the one with BatchNorm, whose batch is that of a process; and regularizers with
# prompts of another kind.
METHODS = {
    **{name: (name, {}) for name in PRESETS if name != "promptkd"},
    "ivlp+prograd": ("ivlp", {"regularizer": "prograd"}),
    "cocoop+kgcoop": ("cocoop", {"regularizer": "kgcoop"}),
}


@dataclass(frozen=True)
class Case:
    method: str
    sharing: str
    is_sharded: bool  # each process encodes its share of the classes, three at a time

    @property
    def name(self) -> str:
        return f"{self.method}/{self.sharing}/{'shares' if self.is_sharded else 'all'}"

    @property
    def is_even(self) -> bool:
        return SHARING[self.sharing][0] % GLOBAL_BATCH == 0

    @classmethod
    def named(cls, name: str) -> Case:
        method, sharing, classes = name.split("/")
        return cls(method, sharing, classes == "shares")


def all_cases() -> list[Case]:
    return list(itertools.starmap(Case, itertools.product(METHODS, SHARING, (False, True))))


def half_of_the_cases() -> list[Case]:
    """Each method with each way of sharing images out, and by turns with and without sharing classes out."""
    pairs = itertools.product(enumerate(METHODS), enumerate(SHARING))
    return [Case(method, sharing, (i + j) % 2 == 1) for (i, method), (j, sharing) in pairs]


class RecordingTrainer(ProGradMixin, Trainer):
    """Keeps the indices of the images of every training step; without a ProGrad adapter it is the stock Trainer."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches.append(inputs["pixel_values"][:, 0, 0, 0].round().int().tolist())
        return super().training_step(model, inputs, *args, **kwargs)


class ReplayingTrainer(RecordingTrainer):
    """Trains on the batches that it is told."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_sampler=self.told, collate_fn=self.data_collator)


class EpochByEpoch:
    """A batch sampler that has other batches in every epoch."""

    def __init__(self, epochs: list[list[list[int]]]) -> None:
        self.epochs, self.next_epoch = epochs, iter(epochs)

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self):
        return iter(next(self.next_epoch))


def images(number: int) -> Dataset:
    """The first value of an image is its index."""
    pixels = torch.randn(number, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    pixels[:, 0, 0, 0] = torch.arange(number)
    labels = [index % len(NAMES) for index in range(number)]
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels}).with_format("torch")


@functools.cache
def load_base() -> CLIPForPromptClassification:
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)


def build(case: Case):
    torch.manual_seed(0)
    classifier = copy.deepcopy(load_base())
    encoder = classifier.class_encoder
    encoder.batch_size, encoder.across_processes = (3, True) if case.is_sharded else (None, False)
    preset, fields = METHODS[case.method]
    return get_peft_model(classifier, CLIPPromptTuningConfig.from_preset(preset, model=classifier, **fields))


def make_trainer(case: Case, trainer_class, output_dir: Path, num_processes: int, **options) -> Trainer:
    num_images, accumulation, loading = SHARING[case.sharing]
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "accelerator_config": loading or None,
        "ddp_find_unused_parameters": case.is_sharded,
    }
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_eval_batch_size=EVAL_BATCH,
        num_train_epochs=2,
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{**settings, **options},
    )
    callbacks = [GaussianPromptAveraging(1, 1)] if case.method == "promptsrc" else []
    trainer = trainer_class(build(case), args, train_dataset=images(num_images), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.batches = []
    return trainer


class Result(NamedTuple):
    """What comes out of a training."""

    losses: list[float]  # of every step, and last that of an evaluation
    tensors: dict[str, torch.Tensor]  # all that was trained
    batches: list[list[int]]  # indices of the images of every step of this process

    def difference(self, other: Result) -> float:
        """The largest one, of losses and of tensors."""
        assert len(self.losses) == len(other.losses) and self.tensors.keys() == other.tensors.keys()
        of_losses = [abs(a - b) for a, b in zip(self.losses, other.losses)]
        return max(of_losses + [(self.tensors[key] - other.tensors[key]).abs().max().item() for key in self.tensors])


def trained(trainer: Trainer) -> Result:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate(images(NUM_EVALUATED))["eval_loss"])
    model = trainer.accelerator.unwrap_model(trainer.model)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Result(losses, tensors, trainer.batches)


def alone(case: Case, output_dir: Path) -> Result:
    """One process, whole batches, all classes at once."""
    assert case.is_even
    simple = replace(case, sharing="even", is_sharded=False)
    return trained(make_trainer(simple, RecordingTrainer, output_dir, num_processes=1))


def replayed(case: Case, output_dir: Path, of_ranks: list[Result]) -> Result:
    """One process on the batches of all."""
    trainer = make_trainer(
        replace(case, is_sharded=False),
        ReplayingTrainer,
        output_dir,
        num_processes=1,
        gradient_accumulation_steps=SHARING[case.sharing][1] * len(of_ranks),
        accelerator_config=None,
    )
    steps = list(zip(*(result.batches for result in of_ranks)))  # of each, the batch of every rank
    epochs = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    trainer.told = EpochByEpoch([list(itertools.chain(*epoch)) for epoch in epochs])
    return trained(trainer)


def run_processes(launcher: str, output_dir: Path, names: list[str], timeout: float) -> list[dict[str, Result]]:
    """Starts the processes; what each of them came to, by case."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), __file__, str(output_dir), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [output_dir / f"{rank}.pt" for rank in range(len(list(output_dir.glob("*.pt"))))]
    return [{name: Result(*of_case) for name, of_case in torch.load(file).items()} for file in files]


def main(output_dir: str, *names: str) -> None:
    """Leaves `RANK.pt`: of every case losses, trained tensors and batches."""
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for name in names:
        trainer = make_trainer(Case.named(name), RecordingTrainer, Path(output_dir), num_processes)
        results[name] = tuple(trained(trainer))
    torch.save(results, Path(output_dir, f"{rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
