"""Memory, seconds and distance of base models in half precision, 8 and 4 bits, with prompts in float32.

    python benchmarks/lean_bases.py                   # bitsandbytes and torchao where they are installed
    python benchmarks/lean_bases.py --classes 1000 --repeats 1

All in one process, in turn; medians, on the CPU. Models have random weights, the same in each row, so the distances
are those of the arithmetic; what a quantization does to the accuracy of trained weights they do not tell. For figures
of one core: `OMP_NUM_THREADS=1 taskset -c 0 python ...`.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec

import torch
from common import SIZES, add_prompts, build_classifier, print_table, time_in_turn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.text.packing import exact_path


def bases() -> dict[str, dict]:
    """The arguments of `from_pretrained` for each base whose library is installed."""
    found: dict[str, dict] = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}
    if find_spec("bitsandbytes"):
        found["bitsandbytes, 8 bit"] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        found["bitsandbytes, 4 bit (nf4)"] = {"quantization_config": four}
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        found["torchao, 8 bit, weights only"] = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    return found


def num_bytes(model) -> int:
    """What the weights take up in a file, which holds the scales of a quantization, too."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _plain(model.state_dict().values()))


def _plain(tensors):
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _plain(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif isinstance(tensor, torch.Tensor):
            yield tensor


def step_function(model, **inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        optimizer.zero_grad()
        model.train()(**inputs).loss.backward()
        optimizer.step()

    return step


def embedding_function(classifier, pixels):
    def embed():
        with torch.no_grad():
            return classifier.eval().get_image_features(pixel_values=pixels.to(classifier.dtype)).pooler_output

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--context", type=int, default=4, help="number of vectors")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    args = parser.parse_args()
    logging.disable_progress_bar()

    full = build_classifier(args.classes, args.size)
    side = full.config.vision_config.image_size
    pixels = torch.randn(args.batch_size, 3, side, side)
    labels = torch.arange(args.batch_size) % args.classes
    rows, steps, embeds, logits = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        full.save_pretrained(folder)
        full.tokenizer.save_pretrained(folder)
        for name, kwargs in bases().items():
            base = CLIPForPromptClassification.from_pretrained(folder, **kwargs).eval()
            rows[name] = [f"{num_bytes(base) / 2**20:.0f}", exact_path(base)]
            torch.manual_seed(0)
            model = add_prompts(base, args.context)
            with torch.no_grad():
                logits[name] = model.eval()(pixel_values=pixels.to(base.dtype)).logits.float()
                image_embeds = base.get_image_features(pixel_values=pixels.to(base.dtype)).pooler_output
            steps[name] = step_function(model, image_embeds=image_embeds, labels=labels)
            embeds[name] = embedding_function(base, pixels)
    spread = logits["float32"].std(dim=0).mean()
    seconds = [time_in_turn(functions, args.repeats, "cpu") for functions in (steps, embeds)]
    for name, row in rows.items():
        distance = (logits[name] - logits["float32"]).abs().max() / spread
        row += [f"{distance:.3f}", *(f"{one[name]:.2f}" for one in seconds)]
    header = ["base", "MiB", "path of texts", "distance", "step, s", f"{args.batch_size} images, s"]
    print_table(
        f"{args.size}, C={args.classes}, n={args.context}", header, [[name, *row] for name, row in rows.items()]
    )
    print(
        f"step: forward, backward and optimizer for {args.classes} classes and image embeddings computed before; "
        "distance: of logits to those of float32, the largest, in standard deviations over images"
    )


if __name__ == "__main__":
    main()
