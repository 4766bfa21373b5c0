"""A Hub that sends something else than was asked for, sends nothing, or sends one elsewhere."""

import json
import re

import pytest
import torch
from adapters import tuned
from conftest import TINY_CLIP
from hub_stand_in import HubStandIn
from safetensors.torch import save
from test_hub import run_client

from clip_prompt_peft import CLIPForPromptClassification


pytestmark = pytest.mark.slow  # a server and waiting for it


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.text_model.embeddings.learnable_embeddings"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The files of an adapter whose base model is on this machine."""
    folder = tmp_path_factory.mktemp("good")
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "dog"])
    tuned(classifier).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def told(good, tmp_path_factory):
    """What came of loading from each repository, and the other host."""
    files = {
        "html": {CONFIG: b"<html>Sign in</html>"},
        "another-file": {WEIGHTS: good["README.md"]},
        "another-adapter": {WEIGHTS: save({KEY: torch.zeros(7, 512)})},
        "frozen-weights": {WEIGHTS: save({KEY: torch.zeros(4, 128), "base_model.model.logit_scale": torch.zeros(())})},
        "not-a-number": {WEIGHTS: save({KEY: torch.full((4, 128), float("nan"))})},
        "slow": {},
        "redirected": {},
        "refused": {},
    }
    folder = tmp_path_factory.mktemp("client")
    (folder / "repositories.json").write_text(json.dumps(list(files)))
    with HubStandIn() as hub, HubStandIn() as elsewhere:
        for name, changed in files.items():
            hub.repos[f"me/{name}"] = elsewhere.repos[f"me/{name}"] = {**good, **changed}
        hub.failures = [
            (f"GET /me/slow/resolve/.*{WEIGHTS}", 2.0),
            (f"/me/redirected/resolve/.*{WEIGHTS}", elsewhere.endpoint.replace("127.0.0.1", "localhost")),
            (f"/me/refused/resolve/.*{WEIGHTS}", 403),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
            run_client(hub, folder, "lied_to")
        return json.loads((folder / "outcomes.json").read_text()), elsewhere


@pytest.mark.parametrize("way", ["auto", "classifier"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("html", "is damaged|Expecting value"),  # of transformers, the second
        ("another-file", "is damaged"),
        ("another-adapter", "shape|mismatched"),
        ("frozen-weights", "would change the frozen model"),
        ("not-a-number", "holds NaN"),
        ("refused", "couldn't connect"),
    ],
)
def test_what_it_sends_is_refused_with_what_is_wrong(told, way, name, said):
    error = told[0][f"{name} {way}"]
    assert error is not None and re.search(said, error["message"]), error


def test_one_that_does_not_answer_is_given_up(told):
    error = told[0]["slow auto"]
    assert error["is_os_error"] and "of 'me/slow' could not be downloaded: timed out" in error["message"]


def test_another_host_does_not_get_the_token(told):
    outcomes, elsewhere = told
    assert elsewhere.requests and not any(elsewhere.tokens)
    assert outcomes["redirected auto"] is None  # what it sent is an adapter
