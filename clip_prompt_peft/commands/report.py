#!/usr/bin/env python
"""Writes what an adapter learned, and how well it does, as one HTML file.

    python report.py outputs/prompt_tuning/seed1
    python report.py user/pets-prompts --dataset_name timm/oxford-iiit-pet --split test --output pets.html

Without a data set, the test images of the style that run_prompt_tuning.py tunes on by default are used.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import transformers
from datasets import Dataset
from transformers import AutoImageProcessor

from .. import AutoPeftModelForPromptClassification
from ..data import load_image_dataset
from ..data.known_datasets import STYLES, load_style
from ..evaluation.comparison import compare_with_zero_shot
from ..evaluation.interpret import describe_words, nearest_words
from ..evaluation.report import write_report
from .arguments import use_one_thread_if_tiny


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    try:
        model = AutoPeftModelForPromptClassification.from_pretrained(args.adapter, base_model_name_or_path=args.base)
        use_one_thread_if_tiny(model.get_base_model().name_or_path)
        model.to(args.device)
        image_processor = AutoImageProcessor.from_pretrained(
            model.get_base_model().name_or_path, trust_remote_code=False
        )
        dataset = load_data(args)
        comparison = compare_with_zero_shot(model, dataset, image_processor)
        name = args.dataset_name or args.style
        facts = {"Tested on": f"{name}, split {args.split!r}"}
        write_report(args.output, model, comparison, dataset, f"Prompts of {args.adapter}", facts)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"report.py: error: {error}")
    for kind in ("zero_shot", "tuned"):
        metrics = ", ".join(f"{key} {value:.1%}" for key, value in getattr(comparison, kind).metrics.items())
        print(f"{kind.replace('_', '-')}: {metrics}")
    print(f"\nThe words nearest to each vector\n{describe_words(nearest_words(model))}")
    print(f"\nWrote {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes a report on an adapter as one HTML file.")
    parser.add_argument("adapter", help="folder or Hub id of the adapter, such as outputs/prompt_tuning/seed1")
    parser.add_argument("--base", help="base model to use instead of the one that the adapter names")
    parser.add_argument("--dataset_name", help="Hub id, or folder, of images to test on")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="else: of the pictures of the examples")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, ...")
    parser.add_argument("--output", default="report.html", help="file to write (default: report.html)")
    return parser.parse_args()


def load_data(args: argparse.Namespace) -> Dataset:
    splits = load_image_dataset(args.dataset_name) if args.dataset_name else load_style(args.style)
    if args.split not in splits:
        raise ValueError(f"There is no split {args.split!r} in the data; there are {', '.join(splits)}.")
    return splits[args.split]


if __name__ == "__main__":
    main()
