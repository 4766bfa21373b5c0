"""The command `convert-open-clip`, and other commands with a checkpoint of open_clip as the base model."""

import json

import pytest
import torch
from hub_stand_in import HubStandIn
from open_clip_cases import Case, clip, pixel_values, with_openai_s_vocabulary
from running_commands import run_command, write_image_folder
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from clip_prompt_peft.commands.convert_open_clip import main as convert
from clip_prompt_peft.commands.export import main as export
from clip_prompt_peft.commands.predict import main as predict
from clip_prompt_peft.commands.train import main as train


@pytest.fixture
def base(tmp_path):
    return with_openai_s_vocabulary(tmp_path / "base", preprocess_cfg={"interpolation": "bilinear"})


def test_it_writes_what_transformers_reads(base, tmp_path, capsys):
    out = tmp_path / "deeper" / "out"
    convert([str(base), str(out)])
    assert f"Saved {out}: a CLIPModel of 2 M parameters" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert AutoImageProcessor.from_pretrained(out).resample == 2
    assert AutoTokenizer.from_pretrained(out)("a cat")["input_ids"] == [49406, 320, 2368, 49407]
    with torch.no_grad():
        embeds = AutoModel.from_pretrained(out).eval().get_image_features(pixel_values()).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(embeds), Case("plain").image_embeds, rtol=0, atol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_is_not_empty_is_kept(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is there and is no empty folder; choose another"):
        convert([str(base), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="is there and is no empty folder"):
        convert([str(base), str(tmp_path / "out" / "mine.txt")])
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(base, tmp_path):
    (tmp_path / "out").mkdir()
    convert([str(base), str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").exists()


def no_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()
    return "holds open_clip_config.json and no weights"


def another_model(folder):
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip({"no_ln_pre": True})}))
    return "In the way: vision_cfg.no_ln_pre"


def no_tokenizer(folder):
    Case("plain").write(folder)
    return "no files of a tokenizer"


def damaged(folder):
    case = Case("plain")
    case.model_cfg = clip(text={"vocab_size": 49408, "context_length": 77})
    case.write(folder)  # with tables of the former sizes
    return "'token_embedding.weight' of shape (99, 32)"


def not_of_open_clip(folder):
    (folder / "open_clip_config.json").rename(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return "it is in the format of transformers already"


@pytest.mark.parametrize("change", [no_weights, another_model, no_tokenizer, damaged, not_of_open_clip])
def test_what_cannot_be_converted_is_told_and_nothing_is_written(change, base, tmp_path):
    said = change(base)
    with pytest.raises(SystemExit) as ended:
        convert([str(base), str(tmp_path / "new" / "out")])
    assert said in str(ended.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_name_that_is_no_folder_and_no_id_is_told(tmp_path):
    with pytest.raises(SystemExit, match="NAME './nowhere' is neither a folder nor a Hub id"):
        convert(["./nowhere", str(tmp_path / "out")])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder, base):
    """The arguments of a short training."""
    photos = write_image_folder(folder / "photos", ["animal", "food"], 2)
    tests = write_image_folder(folder / "tests", ["animal", "food"], 1, split="test")
    options = ("--train_dir", photos, "--test_dir", tests, "--shots", 2, "--num_seeds", 1, "--num_train_epochs", 1)
    return tuple(map(str, (*options, "--output_dir", "out", "--model_name_or_path", base)))


@pytest.mark.slow  # trains
def test_train_predict_and_export_take_the_checkpoint_as_it_is(base, here, capsys):
    train(training(here, base))
    image = str(next((here / "tests" / "food_emoji").iterdir()))
    capsys.readouterr()
    predict(["out", image])
    assert "emoji" in capsys.readouterr().out
    pytest.importorskip("onnxruntime")
    export(["out", "onnx"])
    assert list((here / "onnx").glob("*.onnx"))


@pytest.mark.slow  # a server and processes
def test_a_repository_is_found_again_at_its_commit_and_offline(base, here):
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    refused = {"open_clip_config.json": json.dumps({"model_cfg": clip({"no_ln_pre": True})}).encode()}
    with HubStandIn() as hub:
        hub.repos |= {"me/open-clip": files, "me/refused": {**files, **refused}}
        env = {**hub.client_environment(here / "home"), "HF_HUB_OFFLINE": "0"}
        code, _, errors = run_command("train", *training(here, "me/open-clip"), folder=here, env=env)
        assert code == 0, errors
        config = json.loads((here / "out" / "seed1" / "adapter_config.json").read_text())
        commit = hub.commit_id("me/open-clip")
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/open-clip", commit)

        hub.repos["me/open-clip"] = {**files, "README.md": b"moved"}
        image = next((here / "tests" / "food_emoji").iterdir())
        code, _, errors = run_command("predict", "out", image, folder=here, env={**env, "HF_HUB_OFFLINE": "1"})
        assert (code, errors) == (0, "")

        code, _, errors = run_command("convert_open_clip", "me/refused", "new", folder=here, env=env)
        assert code == 1 and "In the way: vision_cfg.no_ln_pre" in errors
        assert not any("me/refused" in request and "open_clip_model" in request for request in hub.requests)
        assert not (here / "new").exists()
