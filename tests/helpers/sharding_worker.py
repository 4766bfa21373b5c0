"""What every process of test_sharding.py runs: a few steps of training in which each encodes a share of the classes.

sharding_worker.py OUTPUT_DIR
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP


NAMES = ["cat", "red car", "old wooden house", "food", "arrow", "hand with a pen", "clock"]  # no multiple of 2 or 3
NUM_IMAGES, NUM_STEPS = 12, 3


def scenarios():
    """Name and settings of every training."""
    choices = {"adapter": ["prompt", "lora"], "batch_size": [None, 2], "accumulation": [1, 2]}
    for index, values in enumerate(itertools.product(*choices.values())):
        settings = dict(zip(choices, values), find_unused=index % 3 == 0)
        yield "-".join(map(str, settings.values())), settings


def build(adapter, names=NAMES):
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
    if adapter == "lora":
        config = LoraConfig(r=2, target_modules=r"text_model.*q_proj", init_lora_weights=False)
    else:
        config = CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="RANDOM")
    return get_peft_model(classifier, config).train()


def images(model):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(NUM_IMAGES, model.config.projection_dim, generator=generator)
    return embeds, torch.arange(NUM_IMAGES) % len(NAMES)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(adapter, batch_size, accumulation, find_unused):
    """The trained tensors, and how many classes this process encoded in a step."""
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, kwargs_handlers=[kwargs])
    model = build(adapter)
    encoder = model.get_base_model().class_encoder
    encoder.batch_size, encoder.across_processes = batch_size, True
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    embeds, labels = images(model)
    parts = torch.arange(NUM_IMAGES).chunk(accelerator.num_processes * accumulation)
    mine = parts[accelerator.process_index * accumulation :][:accumulation]
    with Encoded(model) as encoded:
        for _ in range(NUM_STEPS):
            for part in mine:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(image_embeds=embeds[part], labels=labels[part]).loss)
                    optimizer.step()
                    optimizer.zero_grad()
    return trained(model), encoded.classes


class Encoded:
    """The most classes that the text tower ran at once."""

    def __init__(self, model):
        self.projection, self.classes = model.get_base_model().text_projection, set()

    def __enter__(self):
        self.hook = self.projection.register_forward_hook(
            lambda module, args, out: self.classes.add(out[..., 0].numel())
        )
        return self

    def __exit__(self, *error):
        self.hook.remove()
        self.classes = max(self.classes)


def by_default():
    """Classes encoded at once in a call of each kind, with no setting made; a single process must not wait."""
    counts = {}
    for kind, names in {"few": NAMES, "many": [f"cat {number}" for number in range(300)]}.items():
        model = build("prompt", names)
        with Encoded(model) as encoded:
            model.get_base_model().get_class_embeds()
        counts[f"{kind}, training"] = encoded.classes
        model.eval()
        if dist.get_rank() == 0:
            with torch.no_grad(), Encoded(model) as encoded:
                model.get_base_model().get_class_embeds()
            counts[f"{kind}, evaluation"] = encoded.classes
    return counts


def main(output_dir):
    tensors, classes = {}, {}
    for name, settings in scenarios():
        result, classes[name] = train(**settings)
        tensors.update({f"{name}/{key}": value for key, value in result.items()})
    defaults = by_default()
    rank = dist.get_rank()
    save_file(tensors, Path(output_dir, f"{rank}.safetensors"))
    Path(output_dir, f"{rank}.json").write_text(json.dumps({"classes": classes, "defaults": defaults}))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
