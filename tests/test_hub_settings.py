"""All files that are loaded later come from where, and with what, the model came."""

import json
from pathlib import Path

import pytest
from conftest import TINY_CLIP
from hub_stand_in import HubStandIn
from test_hub import run_client


pytestmark = pytest.mark.slow  # a server and a process


@pytest.fixture(scope="module")
def hub():
    files = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
    with HubStandIn() as hub:
        without_tokenizer = {name: content for name, content in files.items() if "tokenizer" not in name}
        hub.repos["me/private"] = {**without_tokenizer, **{f"sub/{name}": content for name, content in files.items()}}
        hub.branches["me/private", "v2"] = files
        hub.private["me/private"] = "hf_secret"
        hub.repos["me/open"] = files
        yield hub


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    return run_client(hub, tmp_path_factory.mktemp("client"), "settings")


@pytest.fixture
def noted(folder):
    return json.loads((folder / "noted.json").read_text())


def test_without_the_token_it_is_not_found(noted):
    assert noted["without a token"]["is_os_error"]


def test_the_revision_is_resolved_and_recorded_as_a_commit(hub, noted):
    commit = hub.commit_id("me/private", "v2")
    assert noted["commit"] == noted["config"]["revision"] == commit
    assert noted["config"]["base_model_name_or_path"] == "me/private"


def test_an_adapter_loads_its_own_commit_also_offline(noted):
    assert noted["loaded"] == {"auto": True, "classifier": True, "offline": True}


def test_an_adapter_knows_the_subfolder_of_its_base_model(noted):
    assert noted["subfolder"]


def test_copies_keep_the_settings(noted):
    assert noted["copies"] == [True, True]


def test_the_token_is_in_no_file_no_repr_no_pickle_no_error_and_no_log(noted):
    assert noted["files with the token"] == noted["errors"] == [] and not noted["repr"] and not noted["pickle"]
    assert noted["logged"] == [True, False]


def test_false_sends_no_token_although_there_is_one(hub, noted):
    assert noted["token=False"]["is_os_error"] and noted["token=False beside one of the environment"]["is_os_error"]
    # transformers lists the files of a tokenizer's repository with the token of the environment in any case
    requests = [(request, token) for request, token in zip(hub.requests, hub.tokens) if "/me/open/" in request]
    sent = [token for request, token in requests if "/tree/" not in request]
    assert sent and not any(sent)


def test_of_a_plain_model_the_error_says_what_to_do(noted):
    assert "set model.tokenizer" in noted["plain model"]["message"]
