r"""Compares methods in the protocols of the field, and writes tables and figures.

Without arguments, it runs on the embedded pictures: 1 to 16 shots with three seeds, base and new classes, and two
other styles as unseen domains. An interrupted benchmark continues where it stopped; a finished one is only drawn.

    python -m clip_prompt_peft.commands.benchmark
    python -m clip_prompt_peft.commands.benchmark --methods zero-shot ensemble prompt-tuning --shots 1 16
    python -m clip_prompt_peft.commands.benchmark --model_name_or_path openai/clip-vit-base-patch16 \
        --data pets=timm/oxford-iiit-pet food=ethz/food101 --when_fewer error

Methods are trained on the first of --data and tested on all. If the others have other classes, that is the
cross-data-set protocol.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
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
    methods_table,
    transfer,
    transfer_table,
)
from .common import argument, errors_in_one_line, program_name, silence_libraries, use_one_thread_if_tiny


METRICS = ("accuracy", "mean_class_accuracy", "macro_f1", "expected_calibration_error")


@dataclass
class BenchmarkArguments:
    """The methods to compare, and the data to compare them on."""

    methods: list[str] = argument(
        ["zero-shot", "ensemble", "linear-probe", "lora", "prompt-tuning"],
        "Methods or presets, in the order of the tables.",
    )
    shots: list[int] = argument(
        [1, 2, 4, 8, 16], "Training images per class; all protocols but the few-shot curve use the largest number."
    )
    seeds: list[int] = argument([1, 2, 3], "Seeds of draw and training.")
    data: list[str] | None = argument(
        None,
        "NAME=SOURCE, where the source is a Hub id or a folder with the sub-folders train and test. The first is "
        "trained on. By default the embedded pictures.",
    )
    model_name_or_path: str = argument(TINY_CLIP, "Hub id or folder of a CLIP.")
    device: str = argument("cpu", "Where to compute: cpu, cuda, ...")
    output_dir: str = argument("outputs/few_shot_benchmark", "Folder for results, tables and figures.")
    metric: str = argument("accuracy", f"Metric of tables and figures, one of {', '.join(METRICS)}.")


def main() -> None:
    silence_libraries(progress_bars=True)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_warning()
    with errors_in_one_line():
        parser = HfArgumentParser((BenchmarkArguments, TrainingSettings), prog=program_name())
        args, settings = parser.parse_args_into_dataclasses()
        if args.metric not in METRICS:
            raise ValueError(f"There is no metric {args.metric!r}; there are {', '.join(METRICS)}.")
        load_templates(settings.ensemble)  # raises if the name is unknown
        if args.data is None:
            settings = replace(settings, when_fewer="all")  # some classes have 13 pictures
        data = load_data(args.data)
        source, *targets = data
        shots = [max(args.shots)]
        curve = few_shot_curve(source, args.methods, args.shots, args.seeds)
        base_new = base_to_new(source, args.methods, shots, args.seeds)
        others = transfer(source, targets, args.methods, shots, args.seeds)
        results = Results(args.output_dir, settings.fingerprint(os.path.basename(args.model_name_or_path)))
        benchmark = Benchmark(partial(load_backbone, args, settings), data, results)
        benchmark.run([*curve, *base_new, *others])
    tables = write_tables(results, curve, base_new, others, args)
    print(f"\n{tables}")
    draw_figures(results, curve, base_new, others, args)
    print(f"Figures, predictions and {results.path.name} are in {args.output_dir}")


def load_data(sources: list[str] | None) -> dict[str, DatasetDict]:
    """Returns the data sets by name; the first is the one to train on."""
    if sources is None:
        return {style: load_style(style) for style in STYLES}
    data = {}
    for source in sources:
        name, _, path = source.partition("=")
        if not path:
            raise ValueError(f"--data takes NAME=SOURCE, got {source!r}.")
        data[name] = splits = load_image_dataset(path)
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits["validation"]
    return data


def load_backbone(args: BenchmarkArguments, settings: TrainingSettings) -> Backbone:
    name = args.model_name_or_path
    use_one_thread_if_tiny(name)
    model = AutoModelForPromptClassification.from_pretrained(name, prompt_template=settings.prompt_template)
    return Backbone(model.to(args.device), AutoImageProcessor.from_pretrained(name), settings)


def write_tables(
    results: Results, curve: list[Run], base_new: list[Run], others: list[Run], args: BenchmarkArguments
) -> str:
    """Writes all tables to `tables.md` and returns them."""
    metric, source = args.metric, curve[0].source
    trained = f"trained on {max(args.shots)} images of each"
    spread = f", mean ± standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else ""
    tables = {
        f"{source}, all classes": few_shot_table(results, curve, metric),
        f"{source}, {trained} base class; H is the harmonic mean": base_new_table(results, base_new, metric),
    }
    if len(others[0].tests) > 1:
        tables[f"{trained.capitalize()} class of {source}, tested elsewhere"] = transfer_table(results, others, metric)
    tables[f"{source}, {trained} class, with the trained parameters of each method"] = methods_table(results, others)
    text = f"Percent {metric.replace('_', ' ')}{spread}\n"
    text += "".join(f"\n{title}:\n\n{table}\n" for title, table in tables.items())
    with open(os.path.join(args.output_dir, "tables.md"), "w") as file:
        file.write(text)
    return text


def draw_figures(
    results: Results, curve: list[Run], base_new: list[Run], others: list[Run], args: BenchmarkArguments
) -> None:
    """Draws the scores of every protocol, and confusion and calibration of every method with the most shots."""

    def save(drawn, name: str) -> None:
        plots.save_figure(drawn, os.path.join(args.output_dir, f"{name}.png"))

    metric = args.metric.replace("_", " ")
    save(plots.plot_few_shot_curve(few_shot_scores(results, curve, args.metric), metric), "few_shot_curve")
    save(plots.plot_bars(base_new_scores(results, base_new, args.metric), f"{metric}, %"), "base_new")
    if len(others[0].tests) > 1:
        save(plots.plot_bars(mean_scores(results, others, args.metric), f"{metric}, %"), "transfer")
    for run in curve:
        if run.shots in (0, max(args.shots)) and run.seed in (0, args.seeds[0]):
            predictions = results.predictions(run, run.source)
            is_correct = predictions.labels == predictions.predicted
            axes = plots.plot_confusion_matrix(predictions.labels, predictions.predicted, predictions.class_names)
            save(axes.set_title(run.method).axes, f"confusion_{run.method}")
            axes = plots.plot_reliability(predictions.confidence, is_correct)
            save(axes.set_title(run.method).axes, f"reliability_{run.method}")


if __name__ == "__main__":
    main()
