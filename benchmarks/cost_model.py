"""What a training step costs by arithmetic, and what that means for a given device: for sizes that are not at hand.

    python benchmarks/cost_model.py                                        # 1,000, 21,000 and 1,000,000 classes
    python benchmarks/cost_model.py --classes 5000 --tflops 100 --processes 4

Counts the matrix products of the text tower over the tokens of realistic class names. docs/scaling.md explains the
terms. Nothing is run: `--tflops`, the rate at which the device really does such products, is for you to say.
"""

from __future__ import annotations

import argparse

from common import SIZES, add_prompts, build_classifier, describe_prompts, print_table

from clip_prompt_peft.text.memory import CHUNK, MANY_CLASSES
from clip_prompt_peft.text.packing import PACKED_TOKENS


SAMPLED = 1000  # classes whose names are really tokenized; longer lists have names like these
POSITIONS = 77
FORWARD_AND_BACKWARD = 2  # passes over the weights; their own gradients are not wanted, so backward is one pass
WITH_RECOMPUTATION = 3


def main() -> None:
    args = parse_arguments()
    classifier = add_prompts(build_classifier(SAMPLED, args.size), args.context).get_base_model()
    shared, suffixes, longest = describe_prompts(classifier)
    weights = sum(m.weight.numel() for m in classifier.text_model.modules() if hasattr(m, "in_features"))
    rows = {}
    for num_classes in args.classes:
        for way, (tokens, passes) in count_tokens(num_classes, shared, suffixes / SAMPLED, longest).items():
            tflop = 2 * passes * weights * tokens / 1e12
            seconds = tflop / args.tflops / args.processes
            rows.setdefault(way, [way]).append(f"{tokens:,.0f} tokens, {tflop:,.1f} TFLOP, {seconds:,.3f} s")
    print_table(
        f"{args.size}, n={args.context}, {suffixes / SAMPLED:.2f} tokens a class besides {shared} shared, "
        f"{args.tflops:g} TFLOP/s on each of {args.processes} process(es)",
        ["a step", *(f"C={num_classes:,}" for num_classes in args.classes)],
        list(rows.values()),
    )
    print("\nMemory beside the model and one chunk (float32):")
    for num_classes in args.classes:
        embeds, logits = num_classes * classifier.config.projection_dim, args.batch_size * num_classes
        print(f"- C={num_classes:,}: class embeddings {mib(embeds)}, their gradient as much, logits {mib(logits)}")


def count_tokens(num_classes: int, shared: int, suffix: float, longest: int) -> dict[str, tuple[float, int]]:
    """Tokens that the text tower sees in a step, and passes over its weights, for each way.

    Args:
        shared: tokens that all prompts begin with.
        suffix: mean tokens of a class behind them.
        longest: tokens of the longest prompt.
    """
    in_chunks = num_classes > MANY_CLASSES
    chunk = (CHUNK if in_chunks else num_classes) * suffix  # tokens
    rows_of_chunk = max(1, round(chunk / PACKED_TOKENS))  # each with the shared tokens
    packed = num_classes * suffix * (1 + rows_of_chunk * shared / chunk)
    return {
        "CoOp: 77 tokens": (num_classes * POSITIONS, FORWARD_AND_BACKWARD),
        "cut after the longest": (num_classes * longest, FORWARD_AND_BACKWARD),
        "ours": (packed, WITH_RECOMPUTATION if in_chunks else FORWARD_AND_BACKWARD),
    }


def mib(values: int) -> str:
    return f"{values * 4 / 2**20:,.0f} MiB"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1_000, 21_000, 1_000_000])
    parser.add_argument("--context", type=int, default=16, help="number of vectors")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tflops", type=float, default=100.0, help="of matrix products, per process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--size", default="vit-b-32", choices=list(SIZES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
