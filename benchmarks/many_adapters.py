"""One frozen CLIP, hundreds of prompt adapters: what they weigh, how long loading and switching take, mixed batches.

    python benchmarks/many_adapters.py                                   # the embedded tiny CLIP
    python benchmarks/many_adapters.py --base vit-b-32                   # random weights of that size, no download
    python benchmarks/many_adapters.py --base openai/clip-vit-base-patch32 --device cuda

Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import bytes_held, synchronize, time_once
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP


CLASS_LISTS = [[f"{word} {i}" for i in range(10)] for word in ("animal", "plant", "food", "vehicle")]  # taken in turn

WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    base = load_base(arguments.base, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(base, arguments, Path(folder))
        model, loading = load_all(base, paths)
    names = list(paths)
    rows = loading | measure_switching(model, names) | measure_mixed_batch(model, names[: arguments.batch_size])
    print(f"| {len(names)} adapters on {arguments.base}, {arguments.device} | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY_CLIP, help="Hub id or folder of a CLIP, or vit-b-32 for random weights")
    parser.add_argument("--num_adapters", type=int, default=200)
    parser.add_argument("--num_virtual_tokens", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16, help="images of the mixed batch, each with its adapter")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def load_base(name: str, device: str) -> CLIPForPromptClassification:
    if name != "vit-b-32":
        return CLIPForPromptClassification.from_pretrained(name, class_names=CLASS_LISTS[0]).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)  # its vocabulary is a part of CLIP's
    with torch.device(device):
        clip = CLIPModel(CLIPConfig(text_config={"eos_token_id": tokenizer.eos_token_id}))
    return CLIPForPromptClassification.from_clip(clip, tokenizer=tokenizer, class_names=CLASS_LISTS[0]).eval()


def write_adapters(base: CLIPForPromptClassification, arguments, folder: Path) -> dict[str, Path]:
    """Saves adapters with random vectors; returns their folders by name."""
    paths = {f"adapter-{i}": folder / f"adapter-{i}" for i in range(arguments.num_adapters)}
    config = CLIPPromptTuningConfig(num_virtual_tokens=arguments.num_virtual_tokens, prompt_tuning_init="RANDOM")
    tuned = get_peft_model(base, config)
    for i, path in enumerate(paths.values()):
        base.set_class_names(CLASS_LISTS[i % len(CLASS_LISTS)])
        tuned.save_pretrained(path)
    tuned.unload()
    for path in paths.values():
        weights = load_file(path / WEIGHTS)
        save_file({name: 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}, path / WEIGHTS)
    return paths


def load_all(base: CLIPForPromptClassification, paths: dict[str, Path]) -> tuple[PeftModel, dict[str, str]]:
    base_parameters = sum(p.numel() for p in base.parameters())
    device = str(base.device)
    gc.collect()
    bytes_before, start = bytes_held(device), time.perf_counter()
    (first, path), *others = paths.items()
    model = PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, name)
    synchronize(device)
    seconds = time.perf_counter() - start
    gc.collect()
    held = bytes_held(device) - bytes_before
    files = sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
    vectors = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "learnable_" in n)
    return model, {
        "parameters of the base model": f"{base_parameters / 1e6:.1f} M",
        "files of one adapter": f"{files / 1024:.1f} KB",
        "vectors of all adapters": f"{vectors / 2**20:.2f} MB",
        f"memory {'of the process' if device == 'cpu' else 'on the device'} above the base": f"{held / 2**20:.1f} MB",
        "loading one adapter": f"{seconds / len(paths) * 1e3:.1f} ms",
    }


def measure_switching(model: PeftModel, names: list[str]) -> dict[str, str]:
    times = [time_once(lambda name=name: model.set_adapter(name), str(model.device)) for name in names * 3]
    return {"switching to another adapter": f"{statistics.median(times) * 1e6:.0f} µs"}


@torch.no_grad()
def measure_mixed_batch(model: PeftModel, names: list[str]) -> dict[str, str]:
    size = model.get_base_model().config.vision_config.image_size
    pixel_values = torch.randn(len(names), 3, size, size, device=model.device)

    def mixed():
        return model(pixel_values=pixel_values, adapter_names=names).logits

    def separate():
        logits = []
        for name, image in zip(names, pixel_values):
            model.set_adapter(name)
            logits.append(model(pixel_values=image[None]).logits[0])
        return logits

    device = str(model.device)
    difference = max((a - b).abs().max().item() for a, b in zip(mixed(), separate()))
    return {
        f"{len(names)} images of {len(names)} adapters, one by one": f"{median_ms(separate, device):.1f} ms",
        "the same as one mixed batch": f"{median_ms(mixed, device):.1f} ms",
        "largest difference between their logits": f"{difference:.1e}",
    }


def median_ms(call: Callable, device: str, repetitions: int = 5) -> float:
    return statistics.median(time_once(call, device) for _ in range(repetitions)) * 1e3


if __name__ == "__main__":
    main()
