"""The command `report`: writes what an adapter learned, and how accurate it is, into one HTML file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace

import datasets

from clip_prompt_cli.parsers import add_to_report, check

from ..data import content_hash
from ..evaluation.comparison import compare_with_zero_shot
from ..evaluation.interpret import describe_words, nearest_words
from ..evaluation.report import write_report
from ..evaluation.tables import counted
from .adapters import find_adapter, load_adapter
from .arguments import names_in
from .common import (
    DataclassParser,
    check_device,
    check_extra,
    check_output_file,
    errors_in_one_line,
    progress_bars_of_datasets,
    stopped_in_one_line,
)
from .data import DataArguments, find_test_set
from .outputs import read_record


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = check("report", arguments)
    with stopped_in_one_line():
        report(arguments)


def report(arguments: list[str]) -> None:
    """Does everything."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    datasets.disable_progress_bars()
    parser = DataclassParser((DataArguments,))
    add_to_report(parser)
    with errors_in_one_line([*parser.flags, "split"]):
        data_args, args = parser.parse(arguments)
        check_device(args.device)
        check_extra("report", "matplotlib", "jinja2")
        check_output_file(args.output)
        adapter = find_adapter(args.adapter)
        data_args, expected = choose_data(adapter, data_args, names_in(arguments))
        with progress_bars_of_datasets(not data_args.is_embedded):
            name, dataset = find_test_set(data_args, args.split)
        if expected is not None and args.split is None and content_hash(dataset) != expected["content_hash"]:
            raise ValueError(
                f"The test images of {adapter!r} in {data_args.name!r} have changed since the training. Name the "
                "images to test on (--test_dir, ...), or train it again."
            )
        model, image_processor = load_adapter(adapter, args)
        comparison = compare_with_zero_shot(model, dataset, image_processor)
        place = {**data_args.source("dir"), **data_args.source("file")}.get(name, data_args.name)
        tested_on = place if name == place else f"{place}, {name!r}"
        facts = {**facts_of_training(adapter), "Tested on": tested_on}
        write_report(args.output, model, comparison, dataset, f"Prompts of {adapter}", facts)
    print(f"Tested on {tested_on} ({counted(len(dataset), 'image')})")
    for name, answers in (("zero-shot", comparison.zero_shot), ("tuned", comparison.tuned)):
        print(f"{name}: " + ", ".join(f"{metric} {value:.1%}" for metric, value in answers.metrics.items()))
    if words := nearest_words(model):
        print(f"\nThe words nearest to each vector\n{describe_words(words)}")
    print(f"\nWrote {args.output}")


def choose_data(adapter: str, data_args: DataArguments, given: set[str]) -> tuple[DataArguments, dict | None]:
    """Returns the data to test on and, if they are those of the training, what is known about its test set.

    Args:
        adapter (`str`):
            The folder or Hub id of the adapter.
        data_args (`DataArguments`):
            The arguments of the command line, which go first.
        given (`set[str]`):
            The names of those that the user gave.

    Raises:
        ValueError: If the user names no data, and the data of the training are not known or gone.
    """
    known = {field.name for field in fields(DataArguments)} & given
    if data_args.sources or "style" in known:
        data_args.check(given, needs_train=False)
        return data_args, None
    record = read_record(adapter)
    if record is None:
        raise ValueError(
            f"It is not known which images {adapter!r} was trained on, so name those to test on: --test_dir FOLDER, "
            "--dataset_name ID, ..., or --style fluenthc for the embedded pictures."
        )
    recorded = DataArguments(**record["data"])
    try:
        recorded = replace(recorded, **{name: getattr(data_args, name) for name in known})
        recorded.check(known)
    except ValueError as error:
        raise ValueError(f"The images that {adapter!r} was trained on cannot be read again: {error}") from error
    return recorded, None if known else record["test"]


def facts_of_training(adapter: str) -> dict[str, str]:
    """Returns what is known of the training of an adapter; nothing, if the command `train` did not make it."""
    record = read_record(adapter)
    if record is None:
        return {}
    shots = record.get("settings", {}).get("shots")
    facts = {"Images of each class": shots or "all of them", **record.get("run", {})}
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in facts.items()}


if __name__ == "__main__":
    main()
