"""Writes what an adapter learned, and how accurate it is, into one HTML file.

    python -m clip_prompt_peft.commands.report outputs/prompt_tuning/seed1
    python -m clip_prompt_peft.commands.report user/pets-prompts --dataset_name timm/oxford-iiit-pet --output pets.html

Without a data set, it tests on the embedded pictures that the command `train` tunes on by default.
"""

from __future__ import annotations

import argparse

from ..data import load_image_dataset
from ..data.known_datasets import STYLES, load_style
from ..evaluation.comparison import compare_with_zero_shot
from ..evaluation.interpret import describe_words, nearest_words
from ..evaluation.report import write_report
from .common import add_adapter_arguments, argument_parser, errors_in_one_line, load_adapter, silence_libraries


def main() -> None:
    args = parse_arguments()
    silence_libraries()
    with errors_in_one_line():
        model, image_processor = load_adapter(args)
        splits = load_image_dataset(args.dataset_name) if args.dataset_name else load_style(args.style)
        if args.split not in splits:
            raise ValueError(f"There is no split {args.split!r} in the data; there are {', '.join(splits)}.")
        dataset = splits[args.split]
        comparison = compare_with_zero_shot(model, dataset, image_processor)
        facts = {"Tested on": f"{args.dataset_name or args.style}, split {args.split!r}"}
        write_report(args.output, model, comparison, dataset, f"Prompts of {args.adapter}", facts)
    for name, answers in (("zero-shot", comparison.zero_shot), ("tuned", comparison.tuned)):
        print(f"{name}: " + ", ".join(f"{metric} {value:.1%}" for metric, value in answers.metrics.items()))
    print(f"\nThe words nearest to each vector\n{describe_words(nearest_words(model))}")
    print(f"\nWrote {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_adapter_arguments(parser)
    parser.add_argument("--dataset_name", help="Hub id or folder of the images to test on")
    parser.add_argument("--split", default="test", help="the split of the data to test on (default: test)")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="the embedded pictures to test on")
    parser.add_argument("--output", default="report.html", help="the file to write (default: report.html)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
