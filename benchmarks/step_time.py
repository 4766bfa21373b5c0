"""Seconds of a training step: CoOp as published, simpler savings, peft's TrainableTokens, and this library.

    python benchmarks/step_time.py                          # C = 10 and 100, n = 4 and 16
    python benchmarks/step_time.py --classes 1000 --context 16 --repeats 1
    python benchmarks/step_time.py --ways ours bf16 compiled  # what the Trainer's flags gain
    python benchmarks/step_time.py --device cuda --dtype bfloat16  # with C = 1000, and the captured class encoder

All in one process, in turn; medians. Models have random weights. For figures of one core:
`OMP_NUM_THREADS=1 taskset -c 0 python ...`. On a card the table is in milliseconds, and the lines below it tell how
many kernels a step launches and how long the card is busy with them.
"""

from __future__ import annotations

import argparse

import torch
from common import (
    SIZES,
    add_prompts,
    build_classifier,
    describe_prompts,
    measure_gemm_peak,
    measure_launches,
    needed_flops,
    one_token_words,
    print_table,
    time_in_turn,
)
from peft import TrainableTokensConfig, get_peft_model

from clip_prompt_peft.text import ClassEncoder


WAYS = {
    "A": "CoOp as published: 77 tokens, image tower every step",
    "B": "cut after the longest prompt, image tower every step",
    "C": "cut, image embeddings computed once",
    "D": "C, through peft's TrainableTokens",
    "ours": "packed rows, image embeddings computed once",
}
EXTRAS = {
    "captured": "the same, its class encoder captured as a CUDA graph",
    "bf16": "the same under bfloat16 autocast",
    "compiled": "the same through torch.compile",
}


def build_steps(num_classes: int, num_vectors: int, args) -> tuple[dict, object]:
    """One function for each way, and the classifier that the library's own step uses."""
    labels = torch.arange(args.batch_size, device=args.device) % num_classes
    prompted = add_prompts(build_classifier(num_classes, args.size, args.device, args.dtype), num_vectors)
    side = prompted.config.vision_config.image_size
    pixels = torch.randn(args.batch_size, 3, side, side, device=args.device, dtype=getattr(torch, args.dtype))
    with torch.no_grad():
        embeds = prompted.get_image_features(pixel_values=pixels).pooler_output
    steps = {
        "A": step_function(prompted, "plain", pixel_values=pixels, labels=labels),
        "B": step_function(prompted, "cut", pixel_values=pixels, labels=labels),
        "C": step_function(prompted, "cut", image_embeds=embeds, labels=labels),
        "D": step_function(
            with_trainable_tokens(num_classes, num_vectors, args), "cut", image_embeds=embeds, labels=labels
        ),
        "ours": step_function(prompted, "auto", batch_size="auto", image_embeds=embeds, labels=labels),
    }
    steps["captured"] = step_function(
        prompted, "auto", batch_size="auto", cuda_graph=True, image_embeds=embeds, labels=labels
    )
    steps["bf16"] = torch.autocast(args.device, torch.bfloat16)(steps["ours"])
    steps["compiled"] = step_function(
        prompted, "auto", batch_size="auto", forward=torch.compile(prompted), image_embeds=embeds, labels=labels
    )
    return {name: steps[name] for name in args.ways}, prompted.get_base_model()


def with_trainable_tokens(num_classes: int, num_vectors: int, args):
    """The nearest that peft alone offers: n words whose rows of the token table are trained."""
    classifier = build_classifier(num_classes, args.size, args.device, args.dtype)
    words = one_token_words(classifier.tokenizer)[:num_vectors]
    ids = classifier.tokenizer(words, add_special_tokens=False)["input_ids"]
    classifier.set_prompt_template(" ".join(words) + " {}.")
    config = TrainableTokensConfig(target_modules=["token_embedding"], token_indices=[i for (i,) in ids])
    return get_peft_model(classifier, config).train()


def step_function(model, path: str, batch_size=None, forward=None, cuda_graph=False, **inputs):
    """Forward, backward and an optimizer step, along that path; `forward` in place of calling the model itself."""
    call = model if forward is None else forward
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # It keeps its rows, and what is captured, from step to step, as in training. A capture that is not possible warns.
    encoder = ClassEncoder(path, batch_size, cuda_graph=cuda_graph)

    def step():
        model.get_base_model().class_encoder = encoder
        optimizer.zero_grad()
        call(**inputs).loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", help="by default 10 and 100, on a card also 1000")
    parser.add_argument("--context", type=int, nargs="+", default=[4, 16], help="numbers of vectors")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *EXTRAS], help="by default all but bf16 and compiled")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    on_cpu = args.device == "cpu"
    args.classes = args.classes or ([10, 100] if on_cpu else [10, 100, 1000])
    args.ways = args.ways or ([*WAYS] if on_cpu else [*WAYS, "captured"])
    unit, factor, digits = ("seconds", 1, 3) if on_cpu else ("milliseconds", 1000, 1)
    rows = {name: [(WAYS | EXTRAS)[name]] for name in args.ways}
    notes, header = [], [f"{unit} a step (times ours)"]
    for num_classes in args.classes:
        for num_vectors in args.context:
            steps, classifier = build_steps(num_classes, num_vectors, args)
            seconds = time_in_turn(steps, args.repeats, args.device)
            peak = measure_gemm_peak(args.device, args.dtype)
            header.append(f"C={num_classes} n={num_vectors}")
            for name, value in seconds.items():
                times_ours = f" ({value / seconds['ours']:.1f}x)" if "ours" in seconds else ""
                rows[name].append(f"{factor * value:.{digits}f}{times_ours}")
                activity = measure_launches(steps[name], args.device)
                if activity is not None:
                    launches, busy = activity
                    notes.append(
                        f"C={num_classes} n={num_vectors}, {name}: {launches} kernel launches, card busy for "
                        f"{busy:.1f} of {1000 * value:.1f} ms"
                    )
            shared, suffixes, longest = describe_prompts(classifier)
            share = needed_flops(classifier) / seconds.get("ours", float("nan")) / peak
            notes.append(
                f"C={num_classes} n={num_vectors}: {shared} shared tokens, {suffixes / num_classes:.2f} more a class, "
                f"longest prompt {longest}; ours runs the needed matrix products at {share:.0%} of the GEMM peak "
                f"({peak / 1e9:.0f} GFLOP/s)"
            )
    title = f"{args.size}, batch {args.batch_size}, {args.dtype}, {args.device}, {torch.get_num_threads()} thread(s)"
    print_table(title, header, list(rows.values()))
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
