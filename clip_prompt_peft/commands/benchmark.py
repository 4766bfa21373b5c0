"""The command `benchmark`: compares methods in the protocols of the field, and writes tables and figures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import transformers
from datasets import Dataset, DatasetDict

from clip_prompt_cli.fields import METRICS, BenchmarkArguments
from clip_prompt_cli.parsers import check

from .. import AutoModelForPromptClassification, load_templates
from ..assets import TINY_CLIP
from ..data import content_hash, load_image_dataset
from ..data.known_datasets import STYLES, load_style
from ..evaluation import plots
from ..evaluation.tables import counted
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
    merge_runs,
    methods_table,
    transfer,
    transfer_table,
)
from ..tuner.hub import HubSettings, load_image_processor
from .checks import POSITIVE, check_base_model, check_numbers
from .common import (
    DataclassParser,
    check_device,
    check_extra,
    errors_in_one_line,
    progress_bars_of_datasets,
    silence_libraries,
    stopped_in_one_line,
    use_one_thread_if_tiny,
)
from .data import warn_of_shared_images
from .outputs import check_can_be_written


MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, configuration and tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = check("benchmark", arguments)
    silence_libraries(progress_bars=True)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_warning()
    progress = Progress()
    with stopped_in_one_line(progress.how_to_go_on):
        run_benchmark(arguments, progress)


@dataclass
class Progress:
    """The runs to do, and the results that there are of them."""

    results: Results | None = None
    runs: Sequence[Run] = ()

    @property
    def num_done(self) -> int:
        """The number of runs that have all of their results."""
        return sum(not self.results.missing_tests(run) for run in self.runs) if self.results else 0

    def how_to_go_on(self) -> str:
        if not self.runs:
            return "No run was started."
        verb = "is" if len(self.runs) == 1 else "are"
        return f"{self.num_done} of {counted(len(self.runs), 'run')} {verb} done; run the same command again to go on."


def run_benchmark(arguments: list[str], progress: Progress) -> None:
    """Does everything, and keeps `progress` up to date."""
    parser = DataclassParser((BenchmarkArguments, TrainingSettings))
    with errors_in_one_line(parser.flags):
        args, settings = parser.parse(arguments)
        args.model_name_or_path = args.model_name_or_path or TINY_CLIP
        check_extra("report", "matplotlib", *(["sklearn"] if "linear-probe" in args.methods else []))
        check_arguments(args, settings)
        if args.data is None:
            settings = replace(settings, when_fewer="all")  # some classes have 13 pictures
        with progress_bars_of_datasets(args.data is not None):
            data = load_data(args.data)
        source, *targets = data
        shots = [max(args.shots)]
        curve = few_shot_curve(source, args.methods, args.shots, args.seeds)
        base_new = base_to_new(source, args.methods, shots, args.seeds)
        others = transfer(source, targets, args.methods, shots, args.seeds)
        check_can_be_written(args.output_dir)
        check_base_model(args.model_name_or_path)
        hub = HubSettings().pinned(args.model_name_or_path)
        hashes = {name: hash_of_splits(splits) for name, splits in data.items()}
        results = Results(args.output_dir, settings.fingerprint(identity_of(args.model_name_or_path, hub)), hashes)
        progress.results, progress.runs = results, merge_runs([*curve, *base_new, *others])
        if progress.num_done:
            number = f"{progress.num_done} of {counted(len(progress.runs), 'run')}"
            print(f"The results of {number} were read from {results.path}", flush=True)
        with progress_bars_of_datasets(args.data is not None):  # of the embedded pictures, they come and go
            Benchmark(partial(load_backbone, args, settings, hub), data, results).run(progress.runs)
    tables = write_tables(results, curve, base_new, others, args)
    print(f"\n{tables}")
    draw_figures(results, curve, base_new, others, args)
    print(f"Figures, predictions and {results.path.name} are in {args.output_dir}")


def check_arguments(args: BenchmarkArguments, settings: TrainingSettings) -> None:
    """Raises `ValueError` for values that make no sense, before any image is read."""
    if args.metric not in METRICS:
        raise ValueError(f"There is no metric {args.metric!r}; there are {', '.join(METRICS)}.")
    if min(args.shots) < 1 or min(args.seeds) < 0:
        raise ValueError(f"--shots must be 1 or more and --seeds 0 or more, got {args.shots} and {args.seeds}.")
    check_numbers(settings, dict.fromkeys(("num_train_epochs", "learning_rate", "batch_size"), POSITIVE))
    check_device(args.device)
    load_templates(settings.ensemble)  # raises if the name is unknown


def identity_of(model_name_or_path: str, hub: HubSettings) -> str:
    """Returns the Hub id and commit of a model, or the name of its folder with a hash of its files."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        return f"{model_name_or_path}@{hub.revision}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{folder.resolve().name}-{digest.hexdigest()[:16]}"


def hash_of_splits(splits: Mapping[str, Dataset]) -> str:
    """Returns a hash of the images that are trained and tested on."""
    hashes = [content_hash(splits[name]) for name in ("train", "test") if name in splits]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def load_data(sources: list[str] | None) -> dict[str, DatasetDict]:
    """Returns the data sets by name; the first is the one to train on."""
    if sources is None:
        return {style: load_style(style) for style in STYLES}
    data = {}
    for source in sources:
        name, _, path = source.partition("=")
        if not path:
            raise ValueError(f"--data takes NAME=SOURCE, got {source!r}.")
        if name in data:
            raise ValueError(f"--data names {name!r} twice; give each source a name of its own.")
        data[name] = splits = load_image_dataset(path)
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits["validation"]
        warn_of_shared_images(splits["train"], {f"test of {name}": splits["test"]} if "test" in splits else {})
    return data


def load_backbone(args: BenchmarkArguments, settings: TrainingSettings, hub: HubSettings) -> Backbone:
    name = args.model_name_or_path
    use_one_thread_if_tiny(name)
    model = AutoModelForPromptClassification.from_pretrained(
        name, prompt_template=settings.prompt_template, **hub.arguments
    )
    return Backbone(model.to(args.device), load_image_processor(model), settings)


def write_tables(
    results: Results, curve: list[Run], base_new: list[Run], others: list[Run], args: BenchmarkArguments
) -> str:
    """Writes all tables to `tables.md` and returns them."""
    metric, source = args.metric, curve[0].source
    trained = f"trained on {counted(max(args.shots), 'image')} of each"
    spread = f", mean ± standard deviation over {counted(len(args.seeds), 'seed')}" if len(args.seeds) > 1 else ""
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
