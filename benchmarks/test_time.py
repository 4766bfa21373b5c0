"""Time of test-time prompt tuning for one image: the authors' way, ours one image at a time, and ours in batches.

    python benchmarks/test_time.py
    python benchmarks/test_time.py --classes 1000 --device cuda

The authors' way runs every prompt at 77 tokens through the text tower, twice forward and once backward for each
image, and the image tower for each objective. Ours computes the embeddings of the views once for all objectives, and
packs the prompts; in batches, the images share the first pass of the text tower. The parts are timed in turn, and the
sums are those of TPT alone, and of TPT, C-TPT and R-TPT for the same image. A note compares two ways to compute the
gradients of many images: one backward pass after the other, which the library does, and `is_grads_batched`.
"""

from __future__ import annotations

import argparse

import torch
from common import SIZES, build_classifier, print_table, time_in_turn
from torch.nn.functional import normalize

from clip_prompt_peft import TestTimeTuner
from clip_prompt_peft.text.cache import Memo
from clip_prompt_peft.text.contexts import ContextEncoder, SharedContext
from clip_prompt_peft.training.shared_context import shared_context


NUM_OBJECTIVES = 3


class PlainTuner:
    """TPT for one image, by autograd through prompts of full length, with the context in the token embeddings."""

    def __init__(self, classifier) -> None:
        self.classifier = classifier
        prompts = classifier.class_prompts
        missing = prompts.full_length - prompts.input_ids.shape[1]
        ids = torch.nn.functional.pad(prompts.input_ids, (0, missing), value=prompts.pad_token_id)
        self.ids = ids.to(classifier.device)  # (C, 77)
        self.ends = (prompts.attention_mask.sum(dim=1) - 1).to(classifier.device)
        self.words = classifier.text_embeddings.token_embedding(self.ids)  # (C, 77, D)
        self.context = self.words[0, 1:5]  # "a photo of a"

    def class_embeds(self, context: torch.Tensor) -> torch.Tensor:
        tower, context = self.classifier.text_model, context.expand(len(self.ids), -1, -1)
        inputs = torch.cat([self.words[:, :1], context, self.words[:, 5:]], dim=1)
        states = tower.embeddings(inputs_embeds=inputs)
        length = states.shape[1]
        mask = torch.full((length, length), torch.finfo(states.dtype).min, device=states.device).triu(1)
        states = tower.encoder(inputs_embeds=states, attention_mask=mask[None, None]).last_hidden_state
        pooled = tower.final_layer_norm(states)[torch.arange(len(states)), self.ends]
        return normalize(self.classifier.text_projection(pooled), dim=-1)

    def __call__(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Returns the logits (C,) by the embeddings (V, E) of an image's views."""
        context = self.context.clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=5e-3)
        scale = self.classifier.logit_scale.detach().exp()
        log_p = (scale * image_embeds @ self.class_embeds(context).T).log_softmax(dim=-1)
        entropies = -(log_p.exp() * log_p).sum(dim=-1)
        kept = log_p[entropies.argsort()[: int(0.1 * len(log_p))]]
        mean = kept.exp().mean(dim=0)
        (-(mean * mean.log()).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            return scale * image_embeds[0] @ self.class_embeds(context).T


def gradients_at_once(shared: SharedContext, of_embeds: torch.Tensor) -> torch.Tensor:
    """What `SharedContext.gradients` returns, by one batched backward pass."""
    return torch.autograd.grad(
        shared.output, shared.vectors, of_embeds[:, None], retain_graph=True, is_grads_batched=True
    )[0][:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=8, help="in a batch")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    classifier = build_classifier(args.classes, args.size, args.device).eval()
    side = classifier.config.vision_config.image_size
    pixels = torch.randn(1, args.views, 3, side, side, device=args.device)
    tuner, plain = TestTimeTuner(classifier, batch_size=args.images), PlainTuner(classifier)
    spread = torch.randn(args.images, args.views, classifier.embed_width, device=args.device)
    embeds = normalize(tuner.embed_views(pixels) + 0.1 * normalize(spread, dim=-1), dim=-1)  # as of different images
    layout, _ = shared_context(classifier, Memo())
    encoder = ContextEncoder(classifier, classifier.class_prompts, layout)
    shared = SharedContext(encoder, plain.context)
    of_embeds = torch.randn(args.images, *shared.embeds.shape, device=args.device)
    functions = {
        "image": lambda: tuner.embed_views(pixels),
        "plain": lambda: plain(embeds[0]),
        "single": lambda: [tuner(image_embeds=embeds[index : index + 1]) for index in range(args.images)],
        "batched": lambda: tuner(image_embeds=embeds),
        "loop": lambda: shared.gradients(of_embeds),
    }
    if shared.output is not None:
        functions["at once"] = lambda: gradients_at_once(shared, of_embeds)
    expected, found = plain(embeds[0]), tuner(image_embeds=embeds).logits[0]
    seconds = time_in_turn(functions, args.repeats, args.device)

    ways = {
        "authors' way: 77 tokens, image tower for each objective": (seconds["plain"], NUM_OBJECTIVES),
        "ours, one image at a time": (seconds["single"] / args.images, 1),
        f"ours, {args.images} images at a time": (seconds["batched"] / args.images, 1),
    }
    costs = {
        way: (text, seconds["image"] + text, times * seconds["image"] + NUM_OBJECTIVES * text)
        for way, (text, times) in ways.items()
    }
    best = list(costs.values())[-1]
    rows = [
        [way, *(f"{cost:.3f} ({cost / ours:.1f}x)" for cost, ours in zip(of_way, best))]
        for way, of_way in costs.items()
    ]
    title = f"seconds an image (times the last row), {args.classes} classes, {args.views} views, {args.size}"
    print_table(
        f"{title}, {args.device}", ["way", "text side", "TPT with the image tower", "all three objectives"], rows
    )
    print(f"\nThe image tower takes {seconds['image']:.3f} s for the views of an image.")
    print(f"Largest difference of the logits from the authors' way: {float((found - expected).abs().max()):.1e}.")
    if "at once" in seconds:
        print(
            f"Gradients of {args.images} images: {seconds['loop']:.3f} s one after the other, "
            f"{seconds['at once']:.3f} s with is_grads_batched."
        )


if __name__ == "__main__":
    main()
