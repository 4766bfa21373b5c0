"""Images a second of `cache_image_embeds`, beside those of decoding alone and of the image tower alone.

    python benchmarks/image_embeds.py                         # JPEG files of 500 x 375 pixels, 0 and 1 workers
    python benchmarks/image_embeds.py --workers 0 8 --images 4096 --device cuda --compute_dtype bfloat16

What can be reached at best is the smaller of the two. The model has random weights. On a CPU, workers and tower share
its cores: for figures that mean something, leave the tower as many threads as there are cores beside the workers.
"""

from __future__ import annotations

import argparse
import io
import statistics

import datasets
import numpy as np
import torch
from common import SIZES, build_classifier, print_table, time_once
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import cache_image_embeds, with_pixel_values


PIXELS = (375, 500, 3)  # about the mean of ImageNet


def make_images(num_images: int, num_different: int = 32) -> Dataset:
    """JPEG files of smooth noise, which are as large as photos."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(num_different):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(PIXELS[1::-1])
        noisy = np.asarray(coarse) + draw.normal(0, 6, PIXELS)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    columns = {"image": [{"bytes": files[i % num_different], "path": None} for i in range(num_images)]}
    features = Features(image=ImageFeature(), label=ClassLabel(names=["photo", "picture"]))
    return Dataset.from_dict(columns | {"label": [i % 2 for i in range(num_images)]}, features=features)


def measure(args, num_workers: int, model, image_processor, images: Dataset) -> dict[str, float]:
    """Images a second of each part and of the whole, in turn so that a busy moment hits all alike; medians."""
    loader = DataLoader(
        with_pixel_values(images, image_processor), args.batch_size, num_workers=num_workers, collate_fn=len
    )
    side = model.config.vision_config.image_size
    batch = torch.randn(args.batch_size, 3, side, side, device=args.device)
    dtype = None if args.compute_dtype is None else getattr(torch, args.compute_dtype)

    @torch.no_grad()
    def tower():
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            for _ in range(args.images // args.batch_size):
                model.get_image_features(pixel_values=batch).pooler_output.float().cpu()

    def whole():
        settings = {"num_workers": num_workers, "compute_dtype": args.compute_dtype}
        cache_image_embeds(images, model, image_processor, args.batch_size, **settings)

    parts = {"decoding alone": lambda: sum(loader), "tower alone": tower, "cache_image_embeds": whole}
    seconds = {name: [] for name in parts}
    for repeat in range(args.repeats + 1):
        for name, part in parts.items():
            taken = time_once(part, args.device)
            if repeat:
                seconds[name].append(taken)
    return {name: args.images / statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="a multiple of the batch size")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--compute_dtype", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()  # every run computes its embeddings
    model = build_classifier(2, args.size, args.device).eval()
    model.set_class_names(["photo", "picture"])
    side = model.config.vision_config.image_size
    image_processor = AutoImageProcessor.from_pretrained(
        TINY_CLIP, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    images = make_images(args.images)
    rows = []
    for num_workers in args.workers:
        rates = measure(args, num_workers, model, image_processor, images)
        decoding, tower, whole = rates.values()
        share = whole / min(decoding, tower)
        rows.append([str(num_workers), *(f"{rate:.1f}" for rate in rates.values()), f"{share:.0%}"])
    title = (
        f"{args.size}, batch {args.batch_size}, {args.device}, {torch.get_num_threads()} thread(s), images a second"
    )
    print_table(title, ["workers", "decoding alone", "tower alone", "cache_image_embeds", "of the smaller"], rows)


if __name__ == "__main__":
    main()
