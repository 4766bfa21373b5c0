"""Tests of the commands `train` and `predict`: what they print, what they save, and their messages about mistakes."""

import json
import os
import re

import pytest
import torch
import yaml
from conftest import EMOJI, TINY_CLIP
from running_commands import write_image_folder
from safetensors.torch import load_file

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.data import load_image_dataset


OTHER_STYLES = ("noto", "fluent3d")


def tune_folder(run_here, images, output_dir, *arguments):
    common = ["--model_name_or_path", TINY_CLIP, "--train_dir", images, "--shots", 4, "--output_dir", output_dir]
    return run_here("train", *common, "--disable_tqdm", "true", *arguments)


def test_a_folder_of_images_is_enough(run_here, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=("food", "clock", "hand"), num_images=6)
    printed = tune_folder(run_here, images, "out", "--num_train_epochs", 1, "--augment", "--train_val_split", 0.3)
    assert "held out of train" in printed
    assert "12 training images" in printed
    config = json.loads((tmp_path / "out/seed1/adapter_config.json").read_text())
    assert config["class_names"] == ["clock emoji", "food emoji", "hand emoji"]


def test_a_list_of_paths_says_what_is_tested_on(run_here, tmp_path):
    write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=5)
    listed = [path.relative_to(tmp_path / "images") for path in sorted((tmp_path / "images").glob("*/*"))[::2]]
    (tmp_path / "test.txt").write_text("\n".join(map(str, listed)))
    printed = tune_folder(run_here, "images", "out", "--test_list", "test.txt", "--shots", 2, "--max_steps", 1)
    assert "Tested on  test (5 images)" in printed and "Seed 1: 4 training images" in printed
    with pytest.raises(SystemExit, match="'out/seed1' holds an adapter of another training .--test_list .*test.txt"):
        tune_folder(run_here, "images", "out", "--shots", 2, "--max_steps", 1)
    record = json.loads((tmp_path / "out/seed1/_training.json").read_text())
    assert record["data"]["test_list"] == str(tmp_path / "test.txt")  # valid in any working directory


def test_a_published_split_trains_by_the_same_command(run_here, tmp_path):
    write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=6)
    files = sorted((tmp_path / "images").glob("*/*.png"))
    entries = [
        [str(path.relative_to(tmp_path / "images")), index // 6, path.parent.name] for index, path in enumerate(files)
    ]
    (tmp_path / "split_zhou_Mine.json").write_text(json.dumps({"train": entries[::2], "test": entries[1::2]}))
    source = ["--zhou_split", "split_zhou_Mine.json", "--image_dir", "images", "--model_name_or_path", TINY_CLIP]
    printed = run_here("train", *source, "--shots", 2, "--num_train_epochs", 1, "--output_dir", "out")
    assert "Tested on  test (6 images)" in printed
    assert "split_zhou_Mine.json: 2 images of each of 2 classes" in printed
    assert json.loads((tmp_path / "out/seed1/adapter_config.json").read_text())["class_names"] == [
        "clock emoji",
        "food emoji",
    ]


def test_a_file_with_odd_column_names_trains_by_the_same_command(run_here, tmp_path):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    dataset.rename_columns({"image": "Bild", "label": "was ist es"}).to_parquet(tmp_path / "odd.parquet")
    source = ["--train_file", "odd.parquet", "--test_file", "odd.parquet", "--model_name_or_path", TINY_CLIP]
    printed = run_here("train", *source, "--shots", 1, "--num_train_epochs", 1, "--output_dir", "out")
    assert "odd.parquet: 1 image of each of 12 classes" in printed


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_vectors(run_here, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=6)
    arguments = ["--augment", "--save_strategy", "epoch", "--per_device_train_batch_size", 4]
    arguments += ["--num_train_epochs", 4, "--train_val_split", 0.3]
    tune_folder(run_here, images, "whole", *arguments, "--save_total_limit", 4)
    (tmp_path / "part/seed1").mkdir(parents=True)
    os.rename(tmp_path / "whole/seed1/checkpoint-4", tmp_path / "part/seed1/checkpoint-4")
    tune_folder(run_here, images, "part", *arguments, "--resume_from_checkpoint", "true")
    whole, part = (load_file(tmp_path / name / "seed1/adapter_model.safetensors") for name in ("whole", "part"))
    torch.testing.assert_close(part, whole)
    assert json.loads((tmp_path / "part/seed1/checkpoint-8/trainer_state.json").read_text())["global_step"] == 8


def test_the_best_checkpoint_is_chosen_on_a_few_validation_images_and_not_on_the_test(run_here, tmp_path):
    images = {split: write_image_folder(tmp_path / split, ("food", "clock"), 6) for split in ("train", "validation")}
    test = write_image_folder(tmp_path / "test", ("food", "clock"), 3, split="test")
    arguments = ["--validation_dir", images["validation"], "--test_dir", test, "--num_train_epochs", 2]
    arguments += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", 2]
    arguments += ["--load_best_model_at_end"]
    printed = tune_folder(run_here, images["train"], "out", *arguments, "--metric_for_best_model", "accuracy")
    assert "Tested on  test (6 images)" in printed
    state = json.loads((tmp_path / "out/seed1/checkpoint-2/trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(accuracies) == 2
    assert all((8 * accuracy).is_integer() for accuracy in accuracies)  # 4 shots of 2 classes, not 12 nor 6 images
    assert state["best_metric"] == max(accuracies)


@pytest.mark.slow
def test_settings_may_stand_in_a_file(run_here, tmp_path):
    settings = {"style": "noto", "num_train_epochs": 1, "num_seeds": 1, "seed": 7, "shots": 1, "output_dir": "out"}
    settings["num_virtual_tokens"] = 6
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    for file in ("settings.yaml", "settings.json"):
        printed = run_here("train", file)
        assert "Tuned on   noto: up to 1 image of each of 12 classes, seed 7" in printed
    assert "Saved out/seed7: 3.2 KB" in printed


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--train_dir", "gone"], "The image folder 'gone' does not exist"),
        ("train", ["--train_file", "gone.parquet"], "The file 'gone.parquet' does not exist"),
        ("train", ["--train_dir", "a", "--train_file", "b"], "Give only one of --dataset_name"),
        ("train", ["--train_dir", "."], "no images in '.'"),
        ("train", ["--zhou_split", "gone.json"], "--zhou_split goes together with --image_dir"),
        ("train", ["--webdataset_dir", "."], "no classnames.txt in '.'"),
        (
            "train",
            ["--shots", "20", "--when_fewer", "error"],
            "animal 16, plant 15.*Use --shots 13, or --when_fewer all",
        ),
        ("train", ["--shots", "-1"], "--shots"),
        ("train", ["--num_virtual_tokens", "90"], "has 77 positions"),
        ("train", ["--prompt_template", "no slot"], "holds {} 0 times"),
        ("train", ["--model_name_or_path", "./gone"], "'./gone' is neither a folder nor a Hub id"),
        ("train", ["--push_to_hub"], "--num_seeds 1"),
        ("train", ["--eval_strategy", "epoch"], "needs validation images"),
        ("train", ["--resume_from_checkpoint", "gone", "--num_seeds", "1"], "'gone' is no folder"),
        ("train", ["--shotz", "1"], "no argument '--shotz'; did you mean --shots"),
        ("train", ["--num_train_epochs", "-1"], "--num_train_epochs must be more than 0, got -1"),
        ("train", ["--num_train_epochs", "nan"], "--num_train_epochs must be more than 0"),
        ("train", ["--max_steps", "0"], "--max_steps must be 1 or more"),
        ("train", ["--learning_rate", "0"], "--learning_rate must be more than 0"),
        ("train", ["--learning_rate", "fast"], "--learning_rate.*: invalid float value: 'fast'"),
        ("train", ["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be 1 or more"),
        ("train", ["--per_device_eval_batch_size", "-2"], "--per_device_eval_batch_size must be 1 or more"),
        ("train", ["--adam_beta1", "1.5"], "--adam_beta1 must be from 0"),
        ("train", ["--seed", "-1"], "--seed must be from 0"),
        ("train", ["--save_strategy", "steps", "--save_steps", "0"], "--save_steps must be more than 0"),
        ("train", ["--lr_scheduler_type", "cosin"], "cosin"),
        ("train", ["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        ("train", ["--prediction_loss_only", "true"], "--prediction_loss_only True does not go with"),
        ("train", ["--prediction_loss_only"], "--prediction_loss_only True does not go with"),
        ("train", ["--metric_for_best_model", "speed"], "no --metric_for_best_model 'speed'"),
        ("train", ["--report_to", "wandb"], "wandb|WandbCallback"),
        ("train", ["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be 0 or more"),
        (
            "train",
            ["--method", "clip-lora", "--num_virtual_tokens", "4"],
            "--num_virtual_tokens is about vectors, and --method clip-lora learns none",
        ),
        (
            "train",
            ["--method", "clap", "--num_virtual_tokens", "4"],
            "--num_virtual_tokens is about vectors, and --method clap learns none",
        ),
        ("train", ["--method", "clap", "--label_smoothing_factor", "0.1"], "does not go with the regularizer 'pull'"),
        ("train", ["--method", "tip-adapter", "--num_train_epochs", "3"], "no epochs and no steps.*tip-adapter-f"),
        ("train", ["--method", "kgcoop", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor keeps"),
        ("train", ["--output_dir", "/proc/none/out"], "--output_dir '/proc/none/out/seed1' cannot be written"),
        ("train", ["--output_dir", ""], "--output_dir must be the name of a folder"),
        ("train", ["--test_dir", "."], "--test_dir needs --train_dir beside it"),
        ("train", ["--test_list", "."], "--test_list goes together with --train_dir"),
        ("train", ["--train_dir", ".", "--test_list", "gone.txt"], "--test_list: The file 'gone.txt' does not exist"),
        ("train", ["--train_dir", ".", "--test_list", "a", "--test_dir", "."], "--test_list and --test_dir both say"),
        ("train", ["--image_dir", "."], "--image_dir goes together with --zhou_split"),
        ("train", ["--image_column_name", "x"], "--image_column_name is for data of your own"),
        ("train", ["--train_val_split", "2"], "--train_val_split must lie between 0 and 1|is for data of your own"),
        ("train", ["--dataset_name", "a/b", "--style", "noto"], "--style is of the embedded pictures"),
        ("predict", ["gone/adapter", "cat.jpg", "--top_k", "0"], "--top_k: expected a whole number of 1 or more"),
        ("train", ["photos/train"], "'photos/train' follows no argument"),
        ("train", ["--model_name_or_path", "ADAPTER"], "ADAPTER' is an adapter, and not a model. Name the base"),
        ("train", ["--model_name_or_path", "ADAPTER/.."], "holds adapters, and not a model. Name the base"),
        ("train", ["--model_name_or_path", "gone/clip"], "gone/clip"),
        ("benchmark", ["--model_name_or_path", "ADAPTER"], "'ADAPTER' is an adapter, and not a model"),
        ("predict", ["ADAPTER", "cat.jpg", "--base", "/gone"], "--base '/gone' is neither a folder nor a Hub id"),
        ("serve", ["ADAPTER", "--base", "/gone"], "--base '/gone' is neither a folder nor a Hub id"),
        ("predict", ["cat.jpg", "ADAPTER"], "'cat.jpg' is a file, but an adapter is a folder.* It is named first"),
        ("predict", ["./gone", "."], "There is no folder './gone'"),
        ("predict", ["ADAPTER", "ADAPTER"], "no images in ADAPTER"),
        ("serve", ["./gone"], "There is no folder './gone'"),
        ("serve", ["a", "--adapters", "b"], "argument --adapters: not allowed with argument ADAPTERS"),
        ("predict", ["x", "y", "--device", "cuda:99"], "'cuda:99' cannot be used on this machine"),
        ("report", ["./gone"], "There is no folder './gone'"),
        ("report", ["./gone", "--output", "no/where.html"], "--output 'no/where.html' lies in 'no'"),
        ("serve", ["--port", "99999"], "--port: expected a port from 0 to 65535"),
        ("serve", ["--adapters", "./gone"], "There is no folder './gone'"),
        ("train", ["gone.json"], "gone.json"),
        ("predict", [TINY_CLIP, "cat.jpg"], "adapter_config.json"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_work(run_here, tmp_path, command, arguments, message):
    if any("ADAPTER" in argument for argument in arguments):
        CLIPPromptTuningConfig(base_model_name_or_path=TINY_CLIP).save_pretrained(tmp_path / "ADAPTER")
        (tmp_path / "cat.jpg").touch()
    with pytest.raises(SystemExit) as exit:
        run_here(command, *arguments)
    assert exit.value.code.startswith(f"clip-prompt {command}: error: ")
    assert re.search(message, exit.value.code.replace("\n", " "))
    assert "\n" not in exit.value.code.strip()
    assert not (tmp_path / "outputs").exists()


def test_test_images_are_not_trained_on_by_mistake(run_here, tmp_path):
    for split in ("train", "test"):
        write_image_folder(tmp_path / "photos" / split, ("food", "clock"), 4)
    with pytest.raises(SystemExit, match="--train_dir 'photos' holds test, train, which are splits|not classes"):
        run_here("train", "--train_dir", "photos")
    (tmp_path / "photos/more").mkdir()
    os.rename(tmp_path / "photos/test", tmp_path / "photos/train/more")
    with pytest.raises(SystemExit, match="lies inside of --train_dir 'photos/train'"):
        run_here("train", "--train_dir", "photos/train", "--test_dir", "photos/train/more")


def test_too_few_images_are_told_with_the_flags_that_help(run_here, tmp_path):
    write_image_folder(tmp_path / "photos", ("food", "clock"), 8)
    with pytest.raises(SystemExit, match=r"--shots 16 .*held out for the test.*Use --shots 6, or --when_fewer all"):
        run_here("train", "--train_dir", "photos", "--model_name_or_path", TINY_CLIP)


@pytest.mark.parametrize(
    ("command", "package"), [("serve", "fastapi"), ("demo", "gradio"), ("benchmark", "matplotlib")]
)
def test_a_missing_extra_is_told_before_any_work_and_help_needs_none(run_here, monkeypatch, capsys, command, package):
    monkeypatch.setattr(
        "clip_prompt_peft.commands.common.find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(SystemExit, match=rf'This command needs {package}; pip install .*"{package}>='):
        run_here(command)
    with pytest.raises(SystemExit) as exit:
        run_here(command, "--help")
    assert exit.value.code == 0 and "--" in capsys.readouterr().out


def test_a_stopped_training_says_how_to_go_on(run_here, monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", stop)
    with pytest.raises(SystemExit) as exit:
        run_here("train", "--num_seeds", 1, "--shots", 1, "--disable_tqdm", "true")
    assert exit.value.code == 130
    assert "Stopped. Nothing is saved yet. With --save_strategy epoch there are" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_here("train", "--num_seeds", 1, "--shots", 1, "--disable_tqdm", "true", "--save_strategy", "epoch")
    assert "Stopped. Nothing is saved yet.\n" in capsys.readouterr().err
    assert not (tmp_path / "outputs/prompt_tuning").exists()


def test_an_unknown_style_is_told_with_the_ones_there_are(run_here):
    with pytest.raises(SystemExit, match="invalid choice: 'crayon' .choose from"):
        run_here("train", "--style", "crayon")


def test_a_file_without_labels_is_told_with_its_columns(run_here, tmp_path):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    dataset.select(range(2)).remove_columns("label").to_parquet(tmp_path / "images.parquet")
    with pytest.raises(SystemExit, match=r"No label column; .*The columns are: image \(Image\)"):
        run_here("train", "--train_file", "images.parquet")


def test_the_checkpoints_of_an_earlier_run_are_neither_mixed_in_nor_overwritten(run_here, tmp_path):
    (tmp_path / "outputs/prompt_tuning/seed2/checkpoint-5").mkdir(parents=True)
    with pytest.raises(SystemExit, match="'outputs/prompt_tuning/seed2/checkpoint-5'.*--resume_from_checkpoint true"):
        run_here("train")


def test_pushing_on_a_base_model_that_nobody_can_find_is_warned_of(run_here, caplog):
    with pytest.raises(SystemExit):  # the mistake keeps it from reaching for the Hub
        run_here("train", "--push_to_hub", "--num_seeds", 1, "--num_virtual_tokens", 90)
    assert "--hub_base_model_id ORGANISATION/NAME" in caplog.text
