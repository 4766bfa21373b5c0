"""The commands load the base model of an adapter with the revision that the adapter names."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_CLIP
from hub_stand_in import HubStandIn
from PIL import Image
from running_commands import environment, run_command

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.commands.adapters import base_model_of
from clip_prompt_peft.tuner.hub import HubSettings


def adapters(folder, *places):
    """Writes a configuration for each place, and returns their folders by name."""
    for number, (base, revision, subfolder) in enumerate(places):
        config = CLIPPromptTuningConfig(base_model_name_or_path=base, revision=revision)
        config.base_model_subfolder = subfolder
        config.save_pretrained(folder / f"seed{number}")
    return {f"seed{number}": str(folder / f"seed{number}") for number in range(len(places))}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of the name of the base model, so that the Hub is not asked for it."""
    (tmp_path / "me/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def test_the_base_model_has_the_revision_and_the_subfolder_that_the_adapters_name(tmp_path):
    found = adapters(tmp_path, ("me/clip", "v2", "sub"), ("me/clip", "v2", "sub"))
    assert base_model_of(found) == ("me/clip", HubSettings(revision="v2", subfolder="sub"))
    assert base_model_of(found, "me/clip") == base_model_of(found)
    assert base_model_of(found, "me/other") == ("me/other", HubSettings())


def test_revisions_that_differ_are_different_base_models(tmp_path):
    found = adapters(tmp_path, ("me/clip", "v1", None), ("me/clip", None, None))
    with pytest.raises(ValueError, match="seed0: me/clip, revision v1; seed1: me/clip.*Choose it with --base"):
        base_model_of(found)
    assert base_model_of(found, "me/clip") == ("me/clip", HubSettings())
    assert base_model_of(found, "me/other", "v3") == ("me/other", HubSettings(revision="v3"))


def test_a_folder_has_no_revision(tmp_path):
    found = adapters(tmp_path, ("me/clip", "v1", None))
    for chosen in (None, "me/clip"):
        with pytest.raises(ValueError, match="'me/clip' is a folder, which has no revision 'main'"):
            base_model_of(found, chosen, "main")


@pytest.fixture(scope="module")
def hub():
    """A Hub with a CLIP whose branch `main` is something else by now."""
    with HubStandIn() as hub:
        hub.repos["me/clip"] = {"README.md": b"Moved."}
        hub.branches["me/clip", "v2"] = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
        hub.private["me/clip"] = "hf_secret"
        yield hub


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory):
    """A folder with an adapter of the revision v2, and the environment for the Hub."""
    folder = tmp_path_factory.mktemp("home")
    on_hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    on_hub |= {"HF_TOKEN": "hf_secret", "HF_HOME": str(folder / "cache")}
    arguments = ["--model_name_or_path", "me/clip", "--model_revision", "v2", "--style", "noto", "--max_steps", 1]
    arguments += ["--token", "hf_secret", "--output_dir", "out"]
    without = {**on_hub, "HF_TOKEN": "hf_of_somebody_else"}
    code, printed, errors = run_command("train", *arguments, folder=folder, env=without)
    assert code == 0, printed + errors
    assert "hf_secret" not in printed + errors
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder, on_hub


@pytest.mark.slow
class TestARevisionOfTheHub:
    def test_the_adapter_names_the_commit(self, hub, home):
        config = json.loads((home[0] / "out/seed1/adapter_config.json").read_text())
        assert config["revision"] == hub.commit_id("me/clip", "v2")

    def test_the_token_is_in_no_file(self, home):
        files = [path for path in (home[0] / "out").rglob("*") if path.is_file()]
        assert len(files) > 5
        assert [path.name for path in files if b"hf_secret" in path.read_bytes()] == []

    def test_predict(self, home):
        code, printed, errors = run_command("predict", "out", "red.png", folder=home[0], env=home[1])
        assert code == 0 and "red.png" in printed, errors

    @pytest.mark.parametrize("adapters", ["out", "me/prompts-v1.5"])
    def test_serve(self, hub, home, adapters):
        requests = pytest.importorskip("requests")
        pytest.importorskip("fastapi")
        files = {path.name: path.read_bytes() for path in (home[0] / "out/seed1").iterdir()}
        hub.repos["me/prompts-v1.5"] = {**files, "pytorch_model.bin": b"is not asked for"}
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "clip_prompt_peft.commands.serve",
            "--adapters",
            adapters,
            "--port",
            str(port),
        ]
        service = subprocess.Popen(command, cwd=home[0], env=environment(home[1]), stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(3000):  # on a busy machine the imports alone may take minutes
                try:
                    loaded = requests.get(f"http://127.0.0.1:{port}/adapters", timeout=5).json()["loaded"]
                    break
                except requests.ConnectionError:
                    assert service.poll() is None, service.stderr.read()
                    time.sleep(0.1)
        finally:
            service.kill()
        assert list(loaded) == (["seed1", "seed2", "seed3"] if adapters == "out" else ["prompts-v1-5"])

    def test_demo(self, home):
        code = "from clip_prompt_peft.commands.demo import *; a = find_adapters('out'); base, hub = base_model_of(a);"
        code += "print(Comparison(base, a, hub)(Image.open('red.png'), 'seed1', ['cat', 'dog']))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home[0], env=environment(home[1]), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "'cat'" in done.stdout
