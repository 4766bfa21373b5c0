"""two_stage_processes.py OUTPUT_DIR   what each process runs: two-stage tuning of the embedded CLIP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, method_config, training_recipe
from clip_prompt_peft.assets import TINY_CLIP


NAMES = ["cat", "red car", "old wooden house", "food"]
NUM_IMAGES, BATCH, NUM_STEPS = 24, 12, 8


def images() -> Dataset:
    pixels = torch.randn(NUM_IMAGES, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    labels = [index % len(NAMES) for index in range(NUM_IMAGES)]
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels}).with_format("torch")


def trained(output_dir: str | Path, num_processes: int) -> dict[str, torch.Tensor]:
    """Returns all tensors of the adapter after the training."""
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)
    model = get_peft_model(classifier, method_config("2sfs", classifier))
    given = {"max_steps": NUM_STEPS, "per_device_train_batch_size": BATCH // num_processes, "learning_rate": 1e-3}
    recipe = training_recipe("2sfs", model, NUM_IMAGES, shots=6, use_cpu=True, **given)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
    args = TrainingArguments(str(output_dir), **quiet, **recipe.arguments)
    trainer = recipe.trainer_class(
        model, args, train_dataset=images(), optimizers=recipe.optimizers, callbacks=recipe.callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert not model.active_peft_config.starts_later
    return {name: value.detach() for name, value in model.named_parameters() if ".ln_tuning_" in name}


if __name__ == "__main__":
    tensors = trained(sys.argv[1], int(os.environ["WORLD_SIZE"]))
    torch.save(tensors, Path(sys.argv[1], f"{os.environ['RANK']}.pt"))
