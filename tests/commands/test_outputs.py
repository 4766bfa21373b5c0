"""Tests of what the commands take for an adapter, and of what a training may replace."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_CLIP
from running_commands import write_image_folder

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.commands.adapters import find_adapter, find_adapters
from clip_prompt_peft.commands.outputs import RECORD_NAME


SMALL = ["--num_train_epochs", 1, "--shots", 1, "--disable_tqdm", "true"]


@pytest.fixture
def out(run_here, tmp_path):
    """The output folder of a training with one seed."""
    run_here("train", *SMALL, "--num_seeds", 1, "--output_dir", "out")
    return tmp_path / "out"


def make_adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


def test_several_adapters_are_found_in_their_order_and_the_first_is_used_aloud(tmp_path, capsys):
    for name in ("seed10", "seed2", "seed1", "checkpoint-3"):
        make_adapter(tmp_path / name)
    assert list(find_adapters(str(tmp_path))) == ["seed1", "seed2", "seed10"]
    assert find_adapter(str(tmp_path)) == str(tmp_path / "seed1")
    assert "seed1 is used, and seed2 and seed10 are not" in capsys.readouterr().err
    assert find_adapter(str(tmp_path / "seed2")) == str(tmp_path / "seed2")
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="name one: '.*seed1', '.*seed2', '.*seed10'"):
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./gone", r"There is no folder './gone'; in '.*' there are full, here"),
        ("gone", "Adapters on the Hub are named USER/NAME"),
        ("~/gone/for/good", "does not exist, either"),
        ("a/b/c", "There is no folder 'a/b/c'"),
        ("here/gone", "in '.*here' there is seed"),
        ("user/adapter_model.safetensors", "There is no folder"),
        ("user/pets/", "There is no folder"),
        ("/gone/x", "'/gone' does not exist, either"),
        ("full", "it holds config.json, model.safetensors. That is a whole model and no adapter"),
        ("full/config.json", "is a file, but an adapter is a folder"),
        (".", "adapters lie deeper, in '.*'|holds"),
    ],
)
def test_a_path_never_becomes_a_request_to_the_hub(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/seed/notes").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "full" / file).touch()
    with pytest.raises(ValueError, match=said):
        find_adapters(name)


def test_a_hub_id_stays_one():
    assert find_adapters("user/pets-v1.5") == {"pets-v1.5": "user/pets-v1.5"}


def test_another_training_is_not_replaced_unless_the_user_says_so(run_here, out, capsys):
    before = (out / "seed1/adapter_model.safetensors").read_bytes()
    same = [*SMALL, "--num_seeds", 1, "--output_dir", "out"]
    run_here("train", *same)
    assert (out / "seed1/adapter_model.safetensors").read_bytes() == before
    for arguments, said in (
        (["--style", "noto"], "--style 'fluenthc' there, 'noto' here"),
        (["--learning_rate", 0.1], "--learning_rate not given there, 0.1 here"),
        (["--learning_rate", 2e-3], "--learning_rate not given there, 0.002 here"),  # the recipe has another one
        (["--shots", 2, "--seed", 5], "--shots 1 there, 2 here"),  # beside it would lie another training, too
    ):
        with pytest.raises(SystemExit, match=f"another training .{said}"):
            run_here("train", *same, *arguments)
    assert (out / "seed1/adapter_model.safetensors").read_bytes() == before
    printed = run_here("train", *same, "--shots", 2, "--seed", 5, "--overwrite_output_dir")
    assert "Removed out/seed1 of an earlier training" in printed
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "seed5"]
    (out / "seed5" / RECORD_NAME).unlink()
    with pytest.raises(SystemExit, match="'out/seed5' holds an adapter of an unknown training"):
        run_here("train", *same)
    shutil.copytree(out / "seed5", out, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="'out' is an adapter itself"):
        run_here("train", *same)


def test_the_record_holds_no_token_and_the_report_needs_no_flags(run_here, tmp_path):
    pytest.importorskip("matplotlib")
    images = write_image_folder(tmp_path / "images", ("food", "clock"), 6)
    tune = ["--model_name_or_path", TINY_CLIP, "--train_dir", "images", "--num_train_epochs", 1, "--shots", 4]
    run_here("train", *tune, "--train_val_split", 0.3, "--token", "hf_secret", "--hub_token", "hf_hidden")
    folder = tmp_path / "outputs/prompt_tuning/seed1"
    record = (folder / RECORD_NAME).read_text()
    assert "hf_" not in record and json.loads(record)["data"]["train_dir"] == str(images)
    assert json.loads(record)["run"] == {"Seed": 1, "Epochs": 1.0, "Learning rate": 0.001}
    assert RECORD_NAME.startswith("_")  # the Trainer pushes no such file
    assert "'held out of train' (4 images)" in run_here("report", "outputs/prompt_tuning")
    page = (tmp_path / "report.html").read_text()
    for fact, value in (("Images of each class", 4), ("Seed", 1), ("Epochs", 1), ("Learning rate", 0.001)):
        assert f"<tr><th>{fact}</th><td>{value}</td></tr>" in page
    shutil.copytree(images, tmp_path / "others")
    printed = run_here("report", "outputs/prompt_tuning", "--train_dir", "images", "--test_dir", "others")
    assert "Tested on others, 'test' (12 images)" in printed
    first, *others = images.glob("*/*")
    for file in others:
        shutil.copy(first, file)
    with pytest.raises(SystemExit, match="have changed since the training"):
        run_here("report", "outputs/prompt_tuning")
    shutil.rmtree(images)
    with pytest.raises(SystemExit, match="cannot be read again: --train_dir: The image folder .* does not exist"):
        run_here("report", "outputs/prompt_tuning")
    Path(folder, RECORD_NAME).unlink()
    with pytest.raises(SystemExit, match="It is not known which images .*--test_dir FOLDER"):
        run_here("report", "outputs/prompt_tuning")
