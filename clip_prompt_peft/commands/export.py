"""The command `export`: writes a tuned classifier as ONNX, for machines without PyTorch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import datasets
from datasets import Dataset

from clip_prompt_cli.parsers import parse

from ..data import class_names_of
from ..evaluation.tables import counted
from ..export import NEEDED_PACKAGES, ExportReport, export_classifier
from ..templates import check_label_names
from .adapters import find_adapter, load_adapter
from .common import check_device, check_extra, errors_in_one_line, progress_bars_of_datasets, stopped_in_one_line
from .data import DataArguments, find_test_set
from .outputs import check_can_be_written


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("export", arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    datasets.disable_progress_bars()
    with stopped_in_one_line(), errors_in_one_line(["test_dir", "int8"]):
        report = export(args)
    print(told(report, args.output_dir))


def export(args: argparse.Namespace) -> ExportReport:
    """Does everything."""
    check_extra("export", *NEEDED_PACKAGES)
    check_device(args.device)
    if args.int8 and args.test_dir is None:
        raise ValueError("--int8 needs --test_dir, the images on which to compare the accuracy.")
    adapter = find_adapter(args.adapter)
    check_can_be_written(args.output_dir, "The folder")
    images = None if args.test_dir is None else load_images(args.test_dir)
    model, image_processor = load_adapter(adapter, args)
    if images is None:
        return export_classifier(model, args.output_dir, image_processor=image_processor)
    check_label_names(class_names_of(images), model.class_names)
    labels = images["label"][:]
    return export_classifier(model, args.output_dir, images["image"], labels, image_processor, args.int8)


def load_images(folder: str) -> Dataset:
    """Returns the images of a folder with one sub-folder for each class."""
    data_args = DataArguments(test_dir=folder)
    data_args.check({"test_dir"}, needs_train=False)
    with progress_bars_of_datasets(True):
        return find_test_set(data_args, split=None)[1]


def told(report: ExportReport, folder: str) -> str:
    """Returns what was written, and how it compares with the model."""
    files = ", ".join(f"{name} ({size / 2**20:.1f} MB)" for name, size in report.files.items() if ".onnx" in name)
    compared = counted(report.num_images, "image") if report.num_images else "random pixels"
    lines = [
        f"Wrote {folder}: {files}, with class embeddings, class names and preprocessing beside it",
        f"Its logits differ from the model's by at most {report.max_difference:.1g} on {compared}",
    ]
    if report.int8 is not None:
        int8, kept = report.int8, "" if report.int8.is_kept else ", so it is not kept"
        lines.append(f"Accuracy with 8-bit weights: {int8.accuracy:.1%}, instead of {int8.float_accuracy:.1%}{kept}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
