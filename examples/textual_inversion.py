#!/usr/bin/env python
"""Learns a word for what some pictures show, in a bare `CLIPTextModel` such as the text encoder of Stable Diffusion.

    python textual_inversion.py                    # a word for the embedded pictures of faces
    python textual_inversion.py --concept clock

Injecting, training, saving and loading are what they would be there. Only the loss is another: so that it runs in
seconds, an image tower says how well the text fits the pictures, in place of a denoiser. With diffusers:

    pipeline = StableDiffusionPipeline.from_pretrained(...)
    pipeline.text_encoder.load_adapter("outputs/textual_inversion/face")
    pipeline("a photo of a X toy on the beach", negative_prompt_embeds=...)

The word stands at a fixed place, so texts begin as the template does. Others, such as an empty negative prompt, are to
be encoded with the adapter switched off (`text_encoder.disable_adapters()`, then `enable_adapters()`).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTextModel

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.arguments import use_one_thread_if_tiny
from clip_prompt_peft.data import cache_image_embeds, class_names_of
from clip_prompt_peft.data.known_datasets import STYLES, load_style


TEMPLATE = "a photo of a X {}."  # X becomes the learned word; what follows is up to the text
WORD_POSITION = 5  # of X, behind the begin token and four words
NOUN = "thing"
NUM_FOUND = 20


def main() -> None:
    args = parse_arguments()
    be_quiet()
    use_one_thread_if_tiny(TINY_CLIP)
    torch.manual_seed(0)
    judge = CLIPModel.from_pretrained(TINY_CLIP).eval().requires_grad_(False)
    train, test = embed_pictures(judge, args.concept)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    tokens = tokenizer(TEMPLATE.format(NOUN), return_tensors="pt")

    text_encoder = CLIPTextModel.from_pretrained(TINY_CLIP)
    by_its_name = share_found(
        text_encoder, tokenizer(f"a photo of a {args.concept}.", return_tensors="pt"), judge, *test
    )
    config = CLIPPromptTuningConfig(prompt_template=TEMPLATE, start_idx=WORD_POSITION, num_virtual_tokens=1)
    model = get_peft_model(text_encoder, config)
    model.print_trainable_parameters()
    learn(model, tokens, judge, *train, args.num_steps)
    model.save_pretrained(args.output_dir / args.concept)

    loaded = CLIPTextModel.from_pretrained(TINY_CLIP)
    loaded.load_adapter(str(args.output_dir / args.concept))  # or PeftModel.from_pretrained(loaded, ...)
    after = share_found(loaded, tokens, judge, *test)
    print(f"Of the {NUM_FOUND} test pictures that are nearest to the text, so many show a {args.concept}:")
    print(f"{by_its_name:.0%} for 'a photo of a {args.concept}.'")
    print(f"{after:.0%} for {TEMPLATE.format(NOUN)!r} with the learned X, saved in {args.output_dir / args.concept}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="face", help="a class of the embedded pictures, such as clock or heart")
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/textual_inversion"))
    return parser.parse_args()


def be_quiet() -> None:
    transformers.utils.logging.set_verbosity_error()  # it lists what a text model leaves out of a CLIP
    transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def embed_pictures(judge: CLIPModel, concept: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For training and test: (N, E) normalised embeddings, and (N,) whether a picture shows the concept."""
    pictures = load_style(STYLES[0])
    names = class_names_of(pictures["train"])
    if concept not in names:
        raise SystemExit(f"textual_inversion.py: error: --concept must be one of {', '.join(names)}")
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    embedded = [cache_image_embeds(pictures[split], judge, image_processor) for split in ("train", "test")]
    return [(normalize(part["image_embeds"][:]), part["labels"][:] == names.index(concept)) for part in embedded]


def similarities(text_encoder, tokens, judge: CLIPModel, image_embeds: torch.Tensor) -> torch.Tensor:
    """(N,) how well the text fits each picture."""
    text_embeds = judge.text_projection(text_encoder(**tokens).pooler_output)  # (1, E)
    return image_embeds @ normalize(text_embeds)[0]


def learn(model: PeftModel, tokens, judge, image_embeds, shows_concept, num_steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    target = shows_concept / shows_concept.sum()  # (N,) all pictures of the concept, equally
    for step in range(num_steps):
        logits = judge.logit_scale.exp() * similarities(model, tokens, judge, image_embeds)
        loss = cross_entropy(logits[None], target[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0 or step == num_steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def share_found(text_encoder, tokens, judge, image_embeds, shows_concept) -> float:
    found = similarities(text_encoder, tokens, judge, image_embeds).topk(NUM_FOUND).indices
    return shows_concept[found].float().mean().item()


if __name__ == "__main__":
    main()
