"""Learns a word for the subject of some pictures, in a bare `CLIPTextModel` as in Stable Diffusion.

    python textual_inversion.py                    # a word for the embedded pictures of faces
    python textual_inversion.py --concept clock

Injection, training, saving and loading are the same for Stable Diffusion. Only the loss differs: to run in seconds,
the similarity of text and pictures in a tiny CLIP takes the place of the denoiser. With diffusers:

    pipeline = StableDiffusionPipeline.from_pretrained(...)
    pipeline.text_encoder.load_adapter("outputs/textual_inversion/face")
    pipeline("a photo of a X toy on the beach", negative_prompt_embeds=...)

The word has a fixed position, so all texts must begin as the template does. Encode other texts, such as an empty
negative prompt, with the adapter switched off (`text_encoder.disable_adapters()`, then `enable_adapters()`).
"""

import argparse
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTextModel

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.common import silence_libraries, use_one_thread_if_tiny
from clip_prompt_peft.data import cache_image_embeds, class_names_of
from clip_prompt_peft.data.known_datasets import STYLES, load_style


TEMPLATE = "a photo of a X {}."  # X becomes the learned word, and any noun may follow
WORD_POSITION = 5  # of X, after the begin token and four words
NOUN = "thing"
NUM_FOUND = 20


def embed_pictures(clip: CLIPModel, concept: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns normalized image embeddings (N, E), and whether each picture shows the concept (N,), per split."""
    pictures = load_style(STYLES[0])
    names = class_names_of(pictures["train"])
    if concept not in names:
        raise SystemExit(f"textual_inversion.py: error: --concept must be one of {', '.join(names)}")
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    embedded = [cache_image_embeds(pictures[split], clip, image_processor) for split in ("train", "test")]
    return [(normalize(split["image_embeds"][:]), split["labels"][:] == names.index(concept)) for split in embedded]


def similarities(text_encoder, tokens, clip: CLIPModel, image_embeds: torch.Tensor) -> torch.Tensor:
    """Returns the cosine similarity of the text and each picture (N,)."""
    text_embeds = clip.text_projection(text_encoder(**tokens).pooler_output)  # (1, E)
    return image_embeds @ normalize(text_embeds)[0]


@torch.no_grad()
def share_found(text_encoder, tokens, clip, image_embeds, shows_concept) -> float:
    """Returns the share of the pictures nearest to the text that show the concept."""
    found = similarities(text_encoder, tokens, clip, image_embeds).topk(NUM_FOUND).indices
    return shows_concept[found].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="face", help="a class of the embedded pictures, such as clock or heart")
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/textual_inversion"))
    args = parser.parse_args()
    folder = args.output_dir / args.concept
    silence_libraries()
    transformers.utils.logging.set_verbosity_error()  # it lists the weights of CLIP that a text model leaves out
    use_one_thread_if_tiny(TINY_CLIP)
    torch.manual_seed(0)

    clip = CLIPModel.from_pretrained(TINY_CLIP).eval().requires_grad_(False)
    (image_embeds, shows_concept), test = embed_pictures(clip, args.concept)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    tokens = tokenizer(TEMPLATE.format(NOUN), return_tensors="pt")
    plain_text = f"a photo of a {args.concept}."
    text_encoder = CLIPTextModel.from_pretrained(TINY_CLIP)
    before = share_found(text_encoder, tokenizer(plain_text, return_tensors="pt"), clip, *test)

    config = CLIPPromptTuningConfig(prompt_template=TEMPLATE, start_idx=WORD_POSITION, num_virtual_tokens=1)
    model = get_peft_model(text_encoder, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    target = shows_concept / shows_concept.sum()  # (N,) the same probability for all pictures of the concept
    for step in range(args.num_steps):
        logits = clip.logit_scale.exp() * similarities(model, tokens, clip, image_embeds)
        loss = cross_entropy(logits[None], target[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, args.num_steps - 1):
            print(f"step {step + 1}: loss {loss.item():.3f}")
    model.save_pretrained(folder)

    loaded = CLIPTextModel.from_pretrained(TINY_CLIP)
    loaded.load_adapter(str(folder))  # or PeftModel.from_pretrained(loaded, folder)
    after = share_found(loaded, tokens, clip, *test)
    print(f"Of the {NUM_FOUND} test pictures nearest to the text, so many show a {args.concept}:")
    print(f"{before:.0%} for {plain_text!r}")
    print(f"{after:.0%} for {TEMPLATE.format(NOUN)!r} with the learned X, saved in {folder}")


if __name__ == "__main__":
    main()
