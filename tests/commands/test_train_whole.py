"""Tests of whole runs of the command `train`, in processes of their own, and of what comes out of them."""

import json
import re
import textwrap

import pytest
import torch
from conftest import EMOJI, TINY_CLIP
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from PIL import Image
from running_commands import run_command, write_image_folder
from safetensors.torch import load, load_file
from transformers import AutoImageProcessor

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.data import load_image_dataset, with_pixel_values
from clip_prompt_peft.image_files import process_images


OTHER_STYLES = ("noto", "fluent3d")
pytestmark = pytest.mark.slow  # each run takes about ten seconds


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The command on the embedded pictures, with few epochs and two seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    code, printed, errors = run_command("train", "--num_train_epochs", 12, "--num_seeds", 2, folder=folder)
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


@torch.no_grad()
def accuracy_of(model):
    dataset = load_image_dataset(files={"train": str(EMOJI / "fluenthc-test.parquet")})["train"]
    examples = with_pixel_values(dataset, AutoImageProcessor.from_pretrained(TINY_CLIP))[:]
    answers = model(pixel_values=torch.stack(examples["pixel_values"])).logits.argmax(dim=-1)
    return (answers == torch.tensor(examples["labels"])).float().mean().item()


def test_clip_lora_is_trained_and_the_printed_lines_load_it(run_here, tmp_path):
    options = ["--shots", 1, "--num_seeds", 1, "--max_steps", 4, "--learning_rate", 0.02, "--prompt_template", "an {}"]
    printed = run_here("train", "--method", "clip-lora", *options)
    assert "Saved outputs/prompt_tuning/seed1: 53.8 KB of LORA of peft" in printed
    names = {}
    exec(textwrap.dedent(printed.partition("Load it with\n")[2]), names)
    model = names["model"].eval()
    accuracy = accuracy_of(model)
    results = json.loads((tmp_path / "outputs/prompt_tuning/results.json").read_text())
    assert results["tuned"][0]["fluenthc"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy != pytest.approx(results["zero_shot"]["fluenthc"]["accuracy"])
    log = json.loads((tmp_path / "outputs/prompt_tuning/seed1/_training.json").read_text())["run"]
    assert log["Learning rate"] == 0.02  # given; the schedule and the number of steps as well


@pytest.mark.parametrize("method", ["tip-adapter", "2sfs"])
def test_class_heads_are_trained_and_load_in_one_line(run_here, tmp_path, method):
    options = {"tip-adapter": ["--augment"], "2sfs": ["--max_steps", 4, "--learning_rate", 0.02]}[method]
    printed = run_here("train", "--method", method, "--shots", 1, "--num_seeds", 1, *options)
    kind = "a class head" + (" and tuned LayerNorms" if method == "2sfs" else "")
    assert re.search(rf"Saved outputs/prompt_tuning/seed1: \d+\.\d KB of {kind}\n", printed)
    names = {}
    exec(textwrap.dedent(printed.partition("Load it with\n")[2].partition("or classify")[0]), names)
    model = names["model"].eval()
    assert not model.active_peft_config.starts_later
    accuracy = accuracy_of(model)
    results = json.loads((tmp_path / "outputs/prompt_tuning/results.json").read_text())
    assert results["tuned"][0]["fluenthc"]["accuracy"] == pytest.approx(accuracy)


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
    value = results["tuned"][0]["noto"]["accuracy"]
    assert re.search(rf"accuracy \(noto\), tuned.*\| {value:.4g} \|", card.text)
    assert "### Results on `fluenthc`" in card.text and "accuracy (fluenthc)" not in card.text  # not twice
    assert "- Epochs: `12`\n" in card.text


def test_what_is_pushed_names_its_base_model_and_its_own_place(tmp_path):
    arguments = ["--num_train_epochs", 1, "--num_seeds", 1, "--shots", 1, "--hub_base_model_id", "user/tiny-clip"]
    with HubStandIn() as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
        arguments += ["--push_to_hub", "--hub_model_id", "user/emoji"]
        code, printed, errors = run_command("train", *arguments, folder=tmp_path, env=env)
        assert code == 0, printed + errors
        files = hub.repos["user/emoji"]
    assert "Pushed to user/emoji" in printed
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/tiny-clip"
    assert 'from_pretrained("user/emoji")' in files["README.md"].decode()
    assert (
        load(files["adapter_model.safetensors"]).keys()
        == load_file(tmp_path / "outputs/prompt_tuning/seed1/adapter_model.safetensors").keys()
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
    assert f"Cannot read '{broken}': it is damaged, or no image" in errors
    assert f"Cannot read '{tmp_path / 'gone.jpg'}': No such file" in errors
    model = AutoPeftModelForPromptClassification.from_pretrained(str(adapter)).eval()
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    for path in images.glob("*/*.png"):
        pixel_values = image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            probabilities = model(pixel_values=pixel_values).logits.softmax(dim=-1)[0]
        best, second = probabilities.topk(2).indices.tolist()
        expected = rf"{path} +{model.class_names[best]} +{probabilities[best]:.1%} +{model.class_names[second]} "
        assert re.search(expected, printed), printed


def test_ctrl_c_in_predict_shows_what_is_classified(tuned, run_here, capsys, tmp_path, monkeypatch):
    batches = []

    def process_images_once(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return process_images(*args)

    monkeypatch.setattr("clip_prompt_peft.commands.predict.process_images", process_images_once)
    images = write_image_folder(tmp_path / "images", classes=("food", "clock"), num_images=2)
    with pytest.raises(SystemExit) as exit:
        run_here("predict", tuned[0] / "outputs/prompt_tuning/seed1", images, "--batch_size", 3)
    printed, errors = capsys.readouterr()
    assert exit.value.code == 130
    assert printed.count(str(images)) == 3
    assert errors.endswith("\nStopped. 3 images are classified.\n")


def test_a_published_method_is_trained_as_its_authors_do(tmp_path):
    arguments = ["--method", "maple", "--num_train_epochs", 2, "--num_seeds", 1]
    code, printed, errors = run_command("train", *arguments, "--save_strategy", "epoch", folder=tmp_path)
    assert code == 0, printed + errors
    outputs = tmp_path / "outputs/prompt_tuning/seed1"
    config = json.loads((outputs / "adapter_config.json").read_text())
    assert config["vision_prompts_from_text"] and config["text_prompt_depth"] == 3  # all layers of the tiny CLIP
    (checkpoint,) = outputs.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert state["train_batch_size"] == 4 and max(rates) == 0.0035  # MaPLe's
    assert state["num_train_epochs"] == 2  # the user's
    assert re.search(r"fluenthc +22.5 ", printed)
