"""The base model of an adapter is the state that it was trained on, whatever became of its repository since."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_CLIP
from hub_stand_in import HubStandIn
from running_commands import run_command
from safetensors.torch import load_file, save
from test_hub import run_client


pytestmark = pytest.mark.slow  # a server and a process


@pytest.fixture(scope="module")
def hub():
    """A Hub with a base model, and with what it becomes after the training."""
    files = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
    weights = load_file(Path(TINY_CLIP) / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    other = {**files, "model.safetensors": save(noisy, metadata={"format": "pt"})}
    with HubStandIn() as hub:
        hub.repos |= {"me/moving": files, "me/other": other}
        hub.next_repos["me/moving"] = other
        yield hub


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    return run_client(hub, tmp_path_factory.mktemp("client"), "base_that_moves")


@pytest.fixture
def noted(folder):
    return json.loads((folder / "noted.json").read_text())


def test_adapters_load_the_commit_of_their_training_and_not_the_new_main(noted):
    assert noted["equal"] and all(noted["equal"].values()), noted["equal"]


def test_the_command_answers_as_before(noted):
    said = noted["said"]
    assert "red.png" in said["before"] and said["before"] == said["after"] != said["of main"]


def test_another_revision_or_base_model_is_told(hub, noted):
    commit = next(commit for commit, files in hub.commits.items() if files == hub.repos["me/moving"])
    for way in ("revision", "base", "peft", "lost"):
        (message,) = noted["warned"][way]
        assert "was trained on other weights" in message and "'me/moving' at revision" in message
        assert ("me/moving)" if way in ("revision", "lost") else "me/other)") in message
        assert commit not in message  # it names the commit of the training, not the one that was loaded
    assert "was trained on other weights" in noted["said"]["of main"]


@pytest.mark.parametrize("way", ["auto", "classifier", "demo"])
def test_a_revision_that_is_gone(noted, way):
    error = noted["failed"][way]
    assert error["is_os_error"]
    for said in ("adapter 'me/lost'", "base model 'me/moving' at revision 'deaddead", "no such revision (any more)"):
        assert said in error["message"]
    assert "pass base_model_revision (such as 'main') or base_model_name_or_path" in error["message"]


def test_the_command_says_it_in_one_line(noted):
    (line,) = noted["said"]["lost"].strip().splitlines()
    assert "error: The adapter 'me/lost' was trained on" in line and "--base_revision or --base" in line


def test_a_base_model_that_is_gone(noted):
    message = noted["failed"]["gone"]["message"]
    assert "The adapter 'me/of-gone' was trained on the base model 'me/gone'" in message


def test_a_repository_whose_adapters_are_in_its_folders(noted):
    message = noted["failed"]["folder"]["message"]
    assert "me/seeds" in message and "name it with subfolder=" in message


def test_the_command_works_offline_after_a_first_time(hub, folder, noted):
    offline = {**hub.client_environment(folder / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = ("me/of-moving", folder / "red.png", "--top_k", 3)
    num_requests = len(hub.requests)
    assert run_command("predict", *arguments, folder=folder, env=offline) == (0, noted["said"]["by id"], "")
    assert len(hub.requests) == num_requests
