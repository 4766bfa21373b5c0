"""Tests of the commands `train` and `predict`: what they print, what they save, and their messages about mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import EMOJI, TINY_CLIP
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file
from transformers import AutoImageProcessor

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.data import load_image_dataset, with_pixel_values


OTHER_STYLES = ("noto", "fluent3d")


def run(command, *arguments, folder, env=None):
    """Runs a command in a process of its own and returns its exit code, output and errors."""
    done = subprocess.run(
        [sys.executable, "-m", f"clip_prompt_peft.commands.{command}", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def write_image_folder(folder, classes, num_images, split="train"):
    """Writes a folder of emoji with sub-folders whose names have an underscore."""
    dataset = load_image_dataset(files={"train": str(EMOJI / f"noto-{split}.parquet")})["train"]
    names = dataset.features["label"].names
    for index, label in enumerate(dataset["label"]):
        target = folder / f"{names[label]}_emoji"
        if names[label] in classes and len(list(target.glob("*"))) < num_images:
            target.mkdir(parents=True, exist_ok=True)
            dataset[index]["image"].save(target / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The command on the embedded pictures, with few epochs and two seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    code, printed, errors = run("train", "--num_train_epochs", 12, "--num_seeds", 2, folder=folder)
    assert code == 0, printed + errors
    results = json.loads((folder / "outputs/prompt_tuning/results.json").read_text())
    return folder, printed, results


def test_tuning_beats_the_zero_shot_model_on_its_own_style(tuned):
    _, _, results = tuned
    assert results["seeds"] == [1, 2]
    for run_results in results["tuned"]:
        for metric in ("accuracy", "mean_class_accuracy"):
            assert run_results["fluenthc"][metric] > results["zero_shot"]["fluenthc"][metric] + 0.05


def test_the_table_shows_every_style_with_mean_and_deviation(tuned):
    _, printed, results = tuned
    for style in ("fluenthc", *OTHER_STYLES):
        accuracies = 100 * torch.tensor([run_results[style]["accuracy"] for run_results in results["tuned"]])
        zero_shot = 100 * results["zero_shot"][style]["accuracy"]
        expected = rf"{style} +{zero_shot:.1f} +{accuracies.mean():.1f} ± {accuracies.std(correction=0):.1f} "
        assert re.search(expected, printed), printed
    assert "Saved outputs/prompt_tuning/seed2: 2.2 KB" in printed


def test_the_zero_shot_row_is_what_plain_clip_answers(tuned, clip, tokenizer):
    _, _, results = tuned
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    examples = with_pixel_values(dataset, AutoImageProcessor.from_pretrained(TINY_CLIP))[:]
    texts = [f"a photo of a {name}." for name in dataset.features["label"].names]
    with torch.no_grad():
        text = tokenizer(texts, padding=True, return_tensors="pt")
        answers = clip(**text, pixel_values=torch.stack(examples["pixel_values"])).logits_per_image.argmax(dim=-1)
    accuracy = (answers == torch.tensor(examples["labels"])).float().mean().item()
    assert results["zero_shot"]["noto"]["accuracy"] == pytest.approx(accuracy)


def test_the_printed_line_loads_an_adapter_of_the_same_accuracy(tuned, monkeypatch):
    folder, printed, results = tuned
    monkeypatch.chdir(folder)
    adapter = re.search(r'AutoPeftModelForPromptClassification\.from_pretrained\("(.+)"\)', printed).group(1)
    model = AutoPeftModelForPromptClassification.from_pretrained(adapter).eval()
    dataset = load_image_dataset(files={"train": str(EMOJI / "fluenthc-test.parquet")})["train"]
    examples = with_pixel_values(dataset, AutoImageProcessor.from_pretrained(adapter))[:]
    with torch.no_grad():
        answers = model(pixel_values=torch.stack(examples["pixel_values"])).logits.argmax(dim=-1)
    accuracy = (answers == torch.tensor(examples["labels"])).float().mean().item()
    assert results["tuned"][0]["fluenthc"]["accuracy"] == pytest.approx(accuracy)


def test_the_card_holds_the_results(tuned):
    folder, _, results = tuned
    card = ModelCard.load(folder / "outputs/prompt_tuning/seed1/README.md")
    value = results["tuned"][0]["fluenthc"]["accuracy"]
    assert re.search(rf"accuracy \(fluenthc\), tuned.*\| {value:.4g} \|", card.text)


def test_what_is_pushed_names_its_base_model_and_its_own_place(tmp_path):
    arguments = ["--num_train_epochs", 1, "--num_seeds", 1, "--shots", 1, "--hub_base_model_id", "user/tiny-clip"]
    with HubStandIn() as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
        arguments += ["--push_to_hub", "--hub_model_id", "user/emoji"]
        code, printed, errors = run("train", *arguments, folder=tmp_path, env=env)
        assert code == 0, printed + errors
        files = hub.repos["user/emoji"]
    assert "Pushed to user/emoji" in printed
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/tiny-clip"
    assert 'from_pretrained("user/emoji")' in files["README.md"].decode()
    assert (
        load(files["adapter_model.safetensors"]).keys()
        == load_file(tmp_path / "outputs/prompt_tuning/adapter_model.safetensors").keys()
    )


def test_predict_prints_the_labels_of_the_model_and_reports_what_it_cannot_read(tuned, run_here, capsys, tmp_path):
    folder, _, _ = tuned
    adapter = folder / "outputs/prompt_tuning/seed1"
    images = write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=2)
    broken = images / "broken.png"
    broken.write_text("no image")
    with pytest.raises(SystemExit) as exit:
        run_here("predict", adapter, images, tmp_path / "gone.jpg", "--top_k", 2)
    printed, errors = capsys.readouterr().out, exit.value.code

    assert "2 of 6 files" in errors
    assert f"{broken}: not an image" in errors
    assert f"{tmp_path / 'gone.jpg'}: no such file" in errors
    model = AutoPeftModelForPromptClassification.from_pretrained(str(adapter)).eval()
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    for path in images.glob("*/*.png"):
        pixel_values = image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            probabilities = model(pixel_values=pixel_values).logits.softmax(dim=-1)[0]
        best, second = probabilities.topk(2).indices.tolist()
        expected = rf"{path} +{model.class_names[best]} +{probabilities[best]:.1%} +{model.class_names[second]} "
        assert re.search(expected, printed), printed


def tune_folder(run_here, images, output_dir, *arguments):
    common = ["--model_name_or_path", TINY_CLIP, "--train_dir", images, "--shots", 4, "--output_dir", output_dir]
    return run_here("train", *common, "--disable_tqdm", "true", *arguments)


def test_a_folder_of_images_is_enough(run_here, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=("food", "clock", "hand"), num_images=6)
    printed = tune_folder(run_here, images, "out", "--num_train_epochs", 1, "--augment", "--train_val_split", 0.3)
    assert "held out of train" in printed
    assert "12 training images" in printed
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["class_names"] == ["clock emoji", "food emoji", "hand emoji"]


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
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["class_names"] == [
        "clock emoji",
        "food emoji",
    ]


def test_a_file_with_odd_column_names_trains_by_the_same_command(run_here, tmp_path):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    dataset.rename_columns({"image": "Bild", "label": "was ist es"}).to_parquet(tmp_path / "odd.parquet")
    source = ["--train_file", "odd.parquet", "--test_file", "odd.parquet", "--model_name_or_path", TINY_CLIP]
    printed = run_here("train", *source, "--shots", 1, "--num_train_epochs", 1, "--output_dir", "out")
    assert "odd.parquet: 1 images of each of 12 classes" in printed


def test_an_interrupted_run_continues_to_the_same_vectors(run_here, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=6)
    arguments = ["--augment", "--save_strategy", "epoch", "--per_device_train_batch_size", 4]
    arguments += ["--num_train_epochs", 4, "--train_val_split", 0.3]
    tune_folder(run_here, images, "whole", *arguments, "--save_total_limit", 4)
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "whole/checkpoint-4", tmp_path / "part/checkpoint-4")
    tune_folder(run_here, images, "part", *arguments, "--resume_from_checkpoint", "true")
    whole, part = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    torch.testing.assert_close(part, whole)
    assert json.loads((tmp_path / "part/checkpoint-8/trainer_state.json").read_text())["global_step"] == 8


def test_the_best_checkpoint_is_chosen_on_a_few_validation_images_and_not_on_the_test(run_here, tmp_path):
    images = {split: write_image_folder(tmp_path / split, ("food", "clock"), 6) for split in ("train", "validation")}
    test = write_image_folder(tmp_path / "test", ("food", "clock"), 3, split="test")
    arguments = ["--validation_dir", images["validation"], "--test_dir", test, "--num_train_epochs", 2]
    arguments += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", 2]
    arguments += ["--load_best_model_at_end"]
    printed = tune_folder(run_here, images["train"], "out", *arguments, "--metric_for_best_model", "accuracy")
    assert "Tested on  test (6 images)" in printed
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(accuracies) == 2
    assert all((8 * accuracy).is_integer() for accuracy in accuracies)  # 4 shots of 2 classes, not 12 nor 6 images
    assert state["best_metric"] == max(accuracies)


def test_settings_may_stand_in_a_file(run_here, tmp_path):
    settings = {"style": "noto", "num_train_epochs": 1, "num_seeds": 1, "seed": 7, "shots": 1, "output_dir": "out"}
    settings["num_virtual_tokens"] = 6
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    for file in ("settings.yaml", "settings.json"):
        printed = run_here("train", file)
        assert "Tuned on   noto: up to 1 images of each of 12 classes, seed 7" in printed
    assert "Saved out: 3.2 KB" in printed


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--train_dir", "gone"], "The image folder 'gone' does not exist"),
        ("train", ["--train_file", "gone.parquet"], "The file 'gone.parquet' does not exist"),
        ("train", ["--train_dir", "a", "--train_file", "b"], "Give only one of --dataset_name"),
        ("train", ["--test_dir", "."], "no images in '.'"),
        ("train", ["--zhou_split", "gone.json"], "zhou_split and image_dir go together"),
        ("train", ["--webdataset_dir", "."], "no classnames.txt in '.'"),
        ("train", ["--shots", "20", "--when_fewer", "error"], "animal 16, plant 15.*at most 13"),
        ("train", ["--shots", "-1"], "--shots"),
        ("train", ["--num_virtual_tokens", "90"], "has 77 positions"),
        ("train", ["--prompt_template", "no slot"], "holds {} 0 times"),
        ("train", ["--model_name_or_path", "./gone"], "'./gone' is neither a folder nor a Hub id"),
        ("train", ["--push_to_hub"], "--num_seeds 1"),
        ("train", ["--eval_strategy", "epoch"], "needs validation images"),
        ("train", ["--resume_from_checkpoint", "gone", "--num_seeds", "1"], "'gone' is no folder"),
        ("train", ["--shotz", "1"], "--shotz"),
        ("train", ["gone.json"], "gone.json"),
        ("predict", [TINY_CLIP, "cat.jpg"], "adapter_config.json"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_work(run_here, tmp_path, command, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run_here(command, *arguments)
    assert exit.value.code.startswith(f"python -m clip_prompt_peft.commands.{command}: error: ")
    assert re.search(message, exit.value.code.replace("\n", " "))
    assert not (tmp_path / "outputs").exists()


def test_an_unknown_style_is_told_with_the_ones_there_are(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("train", "--style", "crayon")
    assert "invalid choice: 'crayon' (choose from" in capsys.readouterr().err


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


def test_a_published_method_is_trained_as_its_authors_do(tmp_path):
    arguments = ["--method", "maple", "--num_train_epochs", 2, "--num_seeds", 1]
    code, printed, errors = run("train", *arguments, "--save_strategy", "epoch", folder=tmp_path)
    assert code == 0, printed + errors
    outputs = tmp_path / "outputs/prompt_tuning"
    config = json.loads((outputs / "adapter_config.json").read_text())
    assert config["vision_prompts_from_text"] and config["text_prompt_depth"] == 3  # all layers of the tiny CLIP
    (checkpoint,) = outputs.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert state["train_batch_size"] == 4 and max(rates) == 0.0035  # MaPLe's
    assert state["num_train_epochs"] == 2  # the user's
    assert re.search(r"fluenthc +22.5 ", printed)
