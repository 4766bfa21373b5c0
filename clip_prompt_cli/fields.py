"""The arguments that are fields of dataclasses, which `HfArgumentParser` parses.

`clip_prompt_peft.commands` adds what needs other packages: methods, and the other arguments of the Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


# The library's own tables are not imported here; a test holds these equal to them.
STYLES = ("fluenthc", "noto", "fluent3d")
METHODS = (
    "2sfs",
    "clap",
    "clip-lora",
    "cocoop",
    "coop",
    "coop-csc",
    "ivlp",
    "kgcoop",
    "maple",
    "prograd",
    "promptkd",
    "promptsrc",
    "tcp",
    "tip-adapter",
    "tip-adapter-f",
    "vpt-deep",
    "vpt-shallow",
    "zs-lp",
)
TEST_TIME = ("tpt", "c-tpt", "r-tpt", "tda")
METRICS = ("accuracy", "mean_class_accuracy", "macro_f1", "expected_calibration_error")
DEFAULT_MODEL = "openai/clip-vit-base-patch16"  # for the user's own data
NO_DEFAULT = "%(default).0s"  # prints nothing, and keeps argparse from adding the default
OF_RECIPE = f", by default the recipe's.{NO_DEFAULT}"


def argument(default: Any, help: str, metavar: str | None = None) -> Any:
    """Returns the field of a dataclass that `HfArgumentParser` turns into an argument."""
    metadata = {"help": help} | ({"metavar": metavar} if metavar else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The CLIP to tune."""

    model_name_or_path: str | None = argument(
        None,
        f"Hub id or folder of a CLIP. By default the embedded tiny one, or {DEFAULT_MODEL} for your own data.",
        "MODEL",
    )
    model_revision: str = argument("main", "Branch, tag or commit of the model.", "REVISION")
    cache_dir: str | None = argument(None, "Folder for downloads.", "FOLDER")
    token: str | None = argument(None, "Hub token, for private models and data sets.", "TOKEN")
    hub_base_model_id: str | None = argument(
        None,
        "Hub id to save in the adapter as its base model, if --model_name_or_path is a folder. Others load the base "
        "model from there.",
        "ID",
    )


@dataclass
class DataFields:
    """The images; by default the embedded pictures."""

    style: Literal[STYLES] = argument(  # type: ignore[valid-type]
        STYLES[0], "Style of the embedded pictures to tune on."
    )
    dataset_name: str | None = argument(None, "Hub id of an image classification data set.", "ID")
    dataset_config_name: str | None = argument(None, "Name of its configuration.", "NAME")
    train_dir: str | None = argument(None, "Folder of training images, with one sub-folder for each class.", "FOLDER")
    validation_dir: str | None = argument(None, "Folder of validation images, with the same sub-folders.", "FOLDER")
    test_dir: str | None = argument(None, "Folder of test images, with one sub-folder for each class.", "FOLDER")
    test_list: str | None = argument(
        None,
        "Text file with one path per line, relative to --train_dir: these images are for the test, all others for "
        "training.",
        "FILE",
    )
    train_file: str | None = argument(
        None, "Parquet file of training images and labels, or a csv, tsv or jsonl file of paths and labels.", "FILE"
    )
    validation_file: str | None = argument(None, "File of validation images and labels, of the same kinds.", "FILE")
    test_file: str | None = argument(
        None, "File of test images and labels: parquet, or csv, tsv or jsonl with paths and labels.", "FILE"
    )
    zhou_split: str | None = argument(None, "Published split split_zhou_NAME.json, together with --image_dir.", "FILE")
    image_dir: str | None = argument(None, "Folder that the paths in --zhou_split are relative to.", "FOLDER")
    webdataset_dir: str | None = argument(
        None, "Folder in the layout of CLIP_benchmark: tar files, classnames.txt.", "FOLDER"
    )
    image_column_name: str | None = argument(None, "Column of the images; found by default.", "NAME")
    label_column_name: str | None = argument(None, "Column of the labels; found by default.", "NAME")
    train_val_split: float = argument(
        0.2, "Share of the training images to test on, if there are neither test nor validation images.", "SHARE"
    )


@dataclass
class DataTrainingFields(DataFields):
    """The images to tune and to test on; by default the embedded pictures."""

    shots: int = argument(16, "Training images per class; 0 takes all of them.", "NUMBER")
    when_fewer: Literal["error", "all", "repeat"] | None = argument(
        None,
        "What to do with classes of fewer images than --shots: stop with an error (the default for your own data), "
        "take all of them, or repeat some.",
    )
    num_seeds: int | None = argument(
        None,
        "Number of runs, with --seed, --seed + 1, ... The table shows mean and standard deviation. By default 3 on "
        "the embedded pictures, otherwise 1.",
        "NUMBER",
    )
    augment: bool = argument(
        False, "Random resized crops and flips of the training images. The image tower then runs in every step."
    )
    calibrate: bool = argument(
        False,
        "Fit a temperature on half of the validation images, and scores for sets of classes (`predict --coverage`) "
        "on the other half. Both are saved with the adapter.",
    )


@dataclass
class PromptFields:
    """The prompt to learn."""

    method: Literal[METHODS] | None = argument(  # type: ignore[valid-type]
        None,
        "A published method, with its prompts and its training (optimizer, schedule, learning rate, epochs, batch "
        "size), except for arguments that are given. By default the words in front of {} become vectors, trained with "
        "AdamW.",
        "METHOD",
    )
    teacher: str | None = argument(
        None,
        "Hub id or folder of the teacher of --method promptkd: a larger CLIP, or an adapter. Labels then only choose "
        "the images, --shots of each class or all, and are not learned from.",
        "MODEL",
    )
    prompt_template: str = argument("a photo of a {}.", "Words to start from; {} is the class name.", "TEXT")
    num_virtual_tokens: int | None = argument(
        None, "Number of learned vectors; by default one for each word in front of {}.", "NUMBER"
    )
    prompt_tuning_init: Literal["TEXT", "RANDOM", "SAMPLE_VOCAB"] | None = argument(
        None, "Start from the words of the template (the default), or from random vectors."
    )
    prompt_tuning_init_text: str | None = argument(
        None, "Other words to start from, with as many tokens as there are vectors.", "TEXT"
    )


@dataclass
class TrainerFields:
    """Arguments of the Trainer with defaults and descriptions for few-shot prompt tuning."""

    output_dir: str = argument(
        "outputs/prompt_tuning",
        "Folder for the adapters, one sub-folder seed1, seed2, ... for each, and the results.",
        "FOLDER",
    )
    overwrite_output_dir: bool = argument(False, "Replace adapters of another training in --output_dir.")
    num_train_epochs: float = argument(100, f"Passes over the training images{OF_RECIPE}", "NUMBER")
    per_device_train_batch_size: int = argument(32, f"Images per training step and device{OF_RECIPE}", "NUMBER")
    per_device_eval_batch_size: int = argument(64, "Images per evaluation step and device.", "NUMBER")
    learning_rate: float = argument(2e-3, f"Peak learning rate{OF_RECIPE}", "RATE")
    lr_scheduler_type: str = argument("cosine", f"Learning rate schedule{OF_RECIPE}", "NAME")
    logging_steps: float = argument(0.25, "Steps, or share of all steps, between two logs.", "NUMBER")
    save_strategy: str = argument(
        "no", "When to save checkpoints: no, epoch or steps. --resume_from_checkpoint needs them.", "WHEN"
    )
    save_total_limit: int | None = argument(1, "Number of checkpoints to keep.", "NUMBER")
    resume_from_checkpoint: str | None = argument(
        None, "Continue an interrupted training: a checkpoint, or 'true' for the last one of each seed.", "FOLDER"
    )
    push_to_hub: bool = argument(False, "Push the adapter, with its model card, to the Hub after the training.")
    hub_model_id: str | None = argument(
        None, "Where to push it: ORGANISATION/NAME. By default the name of --output_dir, in your account.", "ID"
    )
    hub_strategy: str = argument("end", "When to push.", "WHEN")
    seed: int = argument(1, "Draws the images and orders them.", "NUMBER")


@dataclass
class BenchmarkArguments:
    """The methods to compare, and the data to compare them on."""

    methods: list[str] = argument(
        ["zero-shot", "ensemble", "linear-probe", "clip-lora", "prompt-tuning"],
        "Methods or presets, in the order of the tables.",
        "METHOD",
    )
    shots: list[int] = argument(
        [1, 2, 4, 8, 16],
        "Training images per class; all protocols but the few-shot curve use the largest number.",
        "NUMBER",
    )
    seeds: list[int] = argument([1, 2, 3], "Seeds of draw and training.", "NUMBER")
    data: list[str] | None = argument(
        None,
        "NAME=SOURCE, where the source is a Hub id or a folder with the sub-folders train and test. The first is "
        "trained on. By default the embedded pictures.",
        "NAME=SOURCE",
    )
    model_name_or_path: str | None = argument(
        None, "Hub id or folder of a CLIP. By default the embedded tiny one.", "MODEL"
    )
    device: str = argument("cpu", "Where to compute: cpu, cuda, ...", "NAME")
    output_dir: str = argument("outputs/few_shot_benchmark", "Folder for results, tables and figures.", "FOLDER")
    metric: str = argument("accuracy", f"Metric of tables and figures, one of {', '.join(METRICS)}.", "NAME")
