"""Whether memory grows: adapters added and deleted, forward passes, trainings, over and over in one process.

    python benchmarks/leaks.py                                           # 1,000, 10,000 and 100 of them
    python benchmarks/leaks.py --cycles 100 --forwards 1000 --trainings 10

Prints a table in Markdown: tensors and objects that are alive, which do not depend on the allocator, and the memory of
the process, or of the card with `--device cuda`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from collections.abc import Callable

import torch
from common import bytes_held
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from clip_prompt_peft import PRESETS, CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.common import silence_libraries


CLASS_NAMES = ["animal", "plant", "food", "vehicle"]
PRESET_NAMES = [name for name in PRESETS if name not in ("prograd", "promptkd")]  # which need Trainers of their own
NUM_COUNTS = 5  # points at which things are counted


def main() -> None:
    args = parse_arguments()
    silence_libraries()
    torch.set_num_threads(1)
    print("| | times | tensors | objects | MiB |\n|---|---|---|---|---|")
    model = classifier_with_adapter().to(args.device)
    repeat("adapter added, used and deleted", lambda i: adapter_cycle(model, i), args.cycles, args.device)
    repeat("forward pass", lambda i: forward(model, i), args.forwards, args.device)
    with tempfile.TemporaryDirectory() as folder:
        presets = itertools.cycle(PRESET_NAMES)
        repeat("training", lambda i: training(folder, next(presets), args.device), args.trainings, args.device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1_000, help="adapters added and deleted")
    parser.add_argument("--forwards", type=int, default=10_000)
    parser.add_argument("--trainings", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the card that the Trainer takes")
    return parser.parse_args()


def repeat(name: str, action: Callable[[int], None], times: int, device: str) -> None:
    """Counts, first after a tenth of the times: what is kept once, by libraries, is there by then."""
    warm_up = max(1, times // 10)
    points = {warm_up + (times - warm_up) * number // (NUM_COUNTS - 1) for number in range(NUM_COUNTS)}
    for number in range(1, times + 1):
        action(number)
        if number in points:
            tensors, objects = count_alive()
            memory = bytes_held(device) / 2**20
            print(f"| {name} | {number:,} | {tensors} | {objects:,} | {memory:.0f} |", flush=True)


def count_alive() -> tuple[int, int]:
    """Tensors, and objects of all kinds that Python's garbage collector knows."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(thing), torch.Tensor) for thing in objects), len(objects)


def classifier_with_adapter(preset: str = "coop") -> PeftModel:
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    return get_peft_model(classifier, CLIPPromptTuningConfig.from_preset(preset, model=classifier)).eval()


def adapter_cycle(model: PeftModel, number: int) -> None:
    """A new adapter, of another kind each time, is trained by a step, used by itself and in a mixed batch, deleted."""
    name = f"adapter-{number}"
    preset = PRESET_NAMES[number % len(PRESET_NAMES)]
    model.add_adapter(name, CLIPPromptTuningConfig.from_preset(preset, model=model.get_base_model()))
    model.set_adapter(name)
    device = model.device
    inputs = {
        "pixel_values": torch.randn(2, 3, 48, 48, device=device),
        "labels": torch.tensor([0, 3], device=device),
    }
    model.train()(**inputs).loss.backward()
    with torch.no_grad():
        model.eval()(pixel_values=inputs["pixel_values"])
        model(pixel_values=inputs["pixel_values"], adapter_names=[name, "__base__"])
    model.set_adapter("default")
    model.delete_adapter(name)
    model.zero_grad()


def forward(model: PeftModel, number: int) -> None:
    """By turns: evaluation, with classes exchanged now and then, training, and the zero-shot model."""
    embeds = torch.randn(2, model.get_base_model().config.projection_dim, device=model.device)
    if number % 100 == 0:
        model.get_base_model().set_class_names([f"{name} {number}" for name in CLASS_NAMES])
    if number % 4 == 0:
        model.train()(image_embeds=embeds, labels=torch.tensor([0, 3], device=model.device)).loss.backward()
    elif number % 4 == 1:
        with model.disable_adapter(), torch.no_grad():
            model.eval()(image_embeds=embeds)
    else:
        with torch.no_grad():
            model.eval()(image_embeds=embeds)


def training(folder: str, preset: str, device: str = "cpu") -> Trainer:
    """A Trainer on a model of its own: three steps, an evaluation, a checkpoint."""
    examples = [{"pixel_values": torch.randn(3, 48, 48), "labels": label} for label in range(len(CLASS_NAMES))]
    args = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )
    trainer = Trainer(classifier_with_adapter(preset), args, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.evaluate(examples)
    return trainer


if __name__ == "__main__":
    main()
