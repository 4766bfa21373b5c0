#!/usr/bin/env python
r"""Compares methods in the protocols of the field, and writes tables and pictures.

Without arguments: on the pictures that come with the examples, 1 to 16 shots and three seeds, base and new classes,
and the other two styles as domains that were not trained on. A benchmark that was stopped goes on where it was; one
that is finished only draws again.

    python few_shot_benchmark.py
    python few_shot_benchmark.py --methods zero-shot ensemble prompt-tuning --shots 1 16
    python few_shot_benchmark.py --model_name_or_path openai/clip-vit-base-patch16 \
        --data pets=timm/oxford-iiit-pet food=ethz/food101 --when_fewer error

The first of --data is trained on, the others are tested on: with other classes that is the cross-data-set protocol.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field, replace
from functools import partial

import datasets
import transformers
from datasets import DatasetDict
from transformers import AutoImageProcessor, HfArgumentParser

from .. import AutoModelForPromptClassification, load_templates
from ..assets import TINY_CLIP
from ..data import load_image_dataset
from ..data.known_datasets import STYLES, load_style
from ..evaluation import plots
from ..protocols import (
    Backbone,
    Benchmark,
    Results,
    Run,
    TrainingSettings,
    base_new_scores,
    base_new_table,
    base_to_new,
    few_shot_curve,
    few_shot_scores,
    few_shot_table,
    mean_scores,
    transfer,
    transfer_table,
)
from .arguments import use_one_thread_if_tiny


METRICS = ("accuracy", "mean_class_accuracy", "macro_f1", "expected_calibration_error")


@dataclass
class BenchmarkArguments:
    """What to compare, and on what."""

    methods: list[str] = field(
        default_factory=lambda: ["zero-shot", "ensemble", "linear-probe", "lora", "prompt-tuning"],
        metadata={"help": "Methods or presets, in the order of the tables."},
    )
    shots: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16],
        metadata={"help": "Training images per class; the largest number serves the other protocols."},
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Of the draw and of the training."})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "NAME=SOURCE, where the source is a Hub id or a folder with the sub-folders train and test. The "
            "first is trained on. By default the pictures that come with the examples."
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a CLIP."})
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, cuda, ..."})
    output_dir: str = field(
        default="outputs/few_shot_benchmark", metadata={"help": "Where results, tables and pictures go."}
    )
    metric: str = field(default="accuracy", metadata={"help": "What the tables show; all metrics are written down."})


def main() -> None:
    set_up_logging()
    args, settings = HfArgumentParser((BenchmarkArguments, TrainingSettings)).parse_args_into_dataclasses()
    try:
        if args.metric not in METRICS:
            raise ValueError(f"There is no metric {args.metric!r}; there are {', '.join(METRICS)}.")
        load_templates(settings.ensemble)  # complains of an unknown name
        if args.data is None:
            settings = replace(settings, when_fewer="all")  # some classes have 13 pictures
        model_name = args.model_name_or_path or TINY_CLIP
        data = load_data(args.data)
        source, *targets = data
        curve = few_shot_curve(source, args.methods, args.shots, args.seeds)
        base_new = base_to_new(source, args.methods, [max(args.shots)], args.seeds)
        others = transfer(source, targets, args.methods, [max(args.shots)], args.seeds)
        results = Results(args.output_dir, settings.fingerprint(os.path.basename(model_name)))
        benchmark = Benchmark(partial(load_backbone, model_name, args.device, settings), data, results)
        benchmark.run([*curve, *base_new, *others])
    except (ValueError, OSError) as error:  # what can be wrong with what was asked for
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")
    tables = write_tables(results, curve, base_new, others, args)
    print(f"\n{tables}")
    draw(results, curve, base_new, others, args)
    print(f"Pictures, predictions and {results.path.name} are in {args.output_dir}")


def set_up_logging() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_warning()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def load_data(sources: list[str] | None) -> dict[str, DatasetDict]:
    """The data sets by name; the first is trained on."""
    if sources is None:
        return {style: load_style(style) for style in STYLES}
    data = {}
    for source in sources:
        name, _, path = source.partition("=")
        if not path:
            raise ValueError(f"--data takes NAME=SOURCE, got {source!r}.")
        splits = load_image_dataset(path)
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits["validation"]
        data[name] = splits
    return data


def load_backbone(model_name: str, device: str, settings: TrainingSettings) -> Backbone:
    use_one_thread_if_tiny(model_name)
    model = AutoModelForPromptClassification.from_pretrained(model_name, prompt_template=settings.prompt_template)
    return Backbone(model.to(device), AutoImageProcessor.from_pretrained(model_name), settings)


def write_tables(
    results: Results, curve: list[Run], base_new: list[Run], others: list[Run], args: BenchmarkArguments
) -> str:
    shots, source = max(args.shots), curve[0].source
    spread = f", mean ± standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else ""
    text = f"""\
Percent {args.metric.replace("_", " ")}{spread}

{source}, all classes:

{few_shot_table(results, curve, args.metric)}

{source}, trained on {shots} images of each base class; H is the harmonic mean:

{base_new_table(results, base_new, args.metric)}
"""
    if len(others[0].tests) > 1:
        text += f"\nTrained on {shots} images of each class of {source}, tested elsewhere:\n\n"
        text += transfer_table(results, others, args.metric) + "\n"
    with open(os.path.join(args.output_dir, "tables.md"), "w") as file:
        file.write(text)
    return text


def draw(results: Results, curve: list[Run], base_new: list[Run], others: list[Run], args: BenchmarkArguments) -> None:
    def save(drawn, name: str) -> None:
        plots.save_figure(drawn, os.path.join(args.output_dir, f"{name}.png"))

    metric = args.metric.replace("_", " ")
    save(plots.plot_few_shot_curve(few_shot_scores(results, curve, args.metric), metric), "few_shot_curve")
    save(plots.plot_bars(base_new_scores(results, base_new, args.metric), f"{metric}, %"), "base_new")
    if len(others[0].tests) > 1:
        save(plots.plot_bars(mean_scores(results, others, args.metric), f"{metric}, %"), "transfer")
    best = [run for run in curve if run.shots in (0, max(args.shots)) and run.seed in (0, args.seeds[0])]
    for run in best:
        predictions = results.predictions(run, run.source)
        axes = plots.plot_confusion_matrix(predictions.labels, predictions.predicted, predictions.class_names)
        save(axes.set_title(run.method).axes, f"confusion_{run.method}")
        is_correct = predictions.labels == predictions.predicted
        axes = plots.plot_reliability(predictions.confidence, is_correct)
        save(axes.set_title(run.method).axes, f"reliability_{run.method}")


if __name__ == "__main__":
    main()
