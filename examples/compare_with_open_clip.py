"""Compares a checkpoint of open_clip, as clip_prompt_peft builds it, with open_clip itself.

pip install open_clip_torch && python examples/compare_with_open_clip.py imageomics/bioclip-2
"""

import argparse
import os

import torch
from PIL import Image

from clip_prompt_peft import AutoModelForPromptClassification, load_image_processor


TEXTS = ["a photo of a barn owl.", "A drawing of Strix aluco, at night", "satellite image of a harbor"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="Hub id or folder with an open_clip_config.json")
    name = parser.parse_args().name

    import open_clip

    theirs = f"{'local-dir' if os.path.isdir(name) else 'hf-hub'}:{name}"
    model, transform = open_clip.create_model_from_pretrained(theirs)
    ids = open_clip.get_tokenizer(theirs)(TEXTS)
    clip = AutoModelForPromptClassification.from_pretrained(name, class_names=TEXTS, prompt_template="{}").eval()

    noise = torch.randint(256, (300, 400, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((600, 450))
    pixels = transform(image)[None]
    ours = load_image_processor(clip)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        images, texts = model.eval().encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
        embeds = clip.get_image_features(pixels).pooler_output
        found = {
            "pixels": (pixels, ours),
            "image embeddings": (images, torch.nn.functional.normalize(embeds)),
            "text embeddings, with both tokenizers": (texts, clip.get_class_embeds()),
            "logits": (model.get_logits(pixels, ids)[0], clip(pixel_values=pixels).logits),
        }
    for what, (expected, actual) in found.items():
        print(f"{what}: largest difference {(expected - actual).abs().max():.1e} of {expected.abs().max():.1e}")


if __name__ == "__main__":
    main()
