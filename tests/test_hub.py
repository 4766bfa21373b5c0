"""Pushing to the Hub and loading from it, with the real client against a stand-in of the Hub."""

import json
import subprocess
import sys
from pathlib import Path

import hub_client
import pytest
from conftest import ROOT, TINY_CLIP
from hub_stand_in import TRUNCATE, HubStandIn
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.testing import assert_close


pytestmark = pytest.mark.slow  # a server and processes


HAND_WRITTEN = "---\nlicense: mit\ntags:\n- mine\n---\n# Pets\n\nA text that somebody wrote on the Hub.\n"


# One process pushes and one process loads, since starting one takes longer than all that it does.
def run_client(hub, folder, *tasks):
    environment = hub.client_environment(folder / "home")
    command = [sys.executable, hub_client.__file__, str(folder), *tasks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        hub.repos[hub_client.BASE] = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
        hub.repos["me/with-card"] = {"README.md": HAND_WRITTEN.encode()}
        yield hub


@pytest.fixture(scope="module")
def pusher(hub, tmp_path_factory):
    """The folder of the process that pushed."""
    hub.failures = [("me/push-refused/preupload", 401), ("me/push-breaks-down/commit", 500)]
    folder = tmp_path_factory.mktemp("pusher")
    return run_client(hub, folder, "push", "push_methods", "push_with_local_base", "push_classifier", "fail_to_push")


@pytest.fixture(scope="module")
def loader(hub, pusher, tmp_path_factory):
    """The folder of the process that loaded."""
    for name in ("no-access", "breaks-down", "breaks-off"):
        hub.repos[f"me/{name}"] = dict(hub.repos["me/by-trainer"])
    config = hub.repos["me/by-trainer"]["adapter_config.json"]
    hub.repos["me/pickled"] = {"adapter_config.json": config, "adapter_model.bin": b"a pickle"}
    hub.failures = [
        ("/me/no-access/resolve/", 401),
        ("GET /me/breaks-down/resolve/.*safetensors", 500),
        ("GET /me/breaks-off/resolve/.*safetensors", TRUNCATE),
    ]
    tasks = "load", "load_methods", "classify_by_pipeline", "fail_to_load"
    return run_client(hub, tmp_path_factory.mktemp("loader"), *tasks)


@pytest.fixture
def logged(pusher):
    return json.loads((pusher / "logged.json").read_text())


@pytest.fixture
def logits_pushed(pusher):
    return load_file(pusher / "pushed.safetensors")["logits"]


def card_of(hub, repo_id):
    return ModelCard(hub.repos[repo_id]["README.md"].decode())


class TestPush:
    def test_sends_a_few_kilobytes(self, hub, pusher):
        sizes = {path: len(content) for path, content in hub.repos["me/by-model"].items()}
        print(f"pushed: {sizes}")
        assert set(sizes) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert sum(sizes.values()) < 8 * 1024
        assert set(hub.repos["me/by-trainer"]) == {*sizes, "training_args.bin"}

    @pytest.mark.parametrize("repo_id", ["me/by-trainer", "me/by-model"])
    def test_card_tells_what_was_tuned_and_how_to_load_it(self, hub, pusher, repo_id):
        card = card_of(hub, repo_id)
        assert card.data.base_model == hub_client.BASE and card.data.get("library_name") == "peft"
        assert card.data.pipeline_tag == "image-classification"
        assert {"clip", "prompt-tuning", f"base_model:adapter:{hub_client.BASE}"} <= set(card.data.tags)
        for said in (
            f"Base model: `{hub_client.BASE}`",
            "Vectors: 5",
            "`X a photo of a {}.`",
            "Classes (3): `cat`, `dog`, `red_car`",
            "from clip_prompt_peft import AutoPeftModelForPromptClassification",
            f'AutoPeftModelForPromptClassification.from_pretrained("{repo_id}")',
            "ccuracy",
        ):
            assert said in card.text

    def test_card_has_the_tags_of_trainer_and_caller(self, hub, pusher):
        assert "generated_from_trainer" in card_of(hub, "me/by-trainer").data.tags
        assert "pets" in card_of(hub, "me/by-model").data.tags

    def test_a_card_written_on_the_hub_keeps_its_text(self, hub, pusher):
        card = card_of(hub, "me/with-card")
        assert "A text that somebody wrote on the Hub." in card.text
        assert card.text.count("## Learned prompts for CLIP") == 1
        assert card.data.license == "mit" and "mine" in card.data.tags and card.data.base_model == hub_client.BASE

    def test_goes_to_the_branch_that_was_asked_for(self, hub, pusher):
        commits = [request for request in hub.requests if "me/with-card/commit" in request]
        assert [request.rpartition("/")[2] for request in commits] == ["preview", "main"]


@pytest.mark.parametrize("method", hub_client.METHODS)
def test_an_adapter_of_each_method_comes_back_in_one_line(hub, pusher, loader, method):
    pushed, loaded = (
        load_file(path) for path in (pusher / "pushed_methods.safetensors", loader / "methods.safetensors")
    )
    assert_close(loaded[method], pushed[method])
    assert "AutoPeftModelForPromptClassification.from_pretrained" in card_of(hub, f"me/{method}").text
    assert sum(map(len, hub.repos[f"me/{method}"].values())) < 200 * 1024


class TestClassifier:
    @pytest.mark.parametrize("repo_id", ["me/classifier", "me/saved-and-pushed"])
    def test_its_tokenizer_and_its_pipeline_go_with_it(self, hub, pusher, repo_id):
        needed = {"config.json", "model.safetensors", "tokenizer.json", "prompt_classification_pipeline.py"}
        assert needed <= hub.repos[repo_id].keys()

    def test_pipelines_load_adapters_and_classifiers_of_the_hub(self, loader):
        for name, answers in json.loads((loader / "answers.json").read_text()).items():
            expected = answers.pop("expected")
            for way, answer in answers.items():
                scores = {entry["label"]: entry["score"] for entry in answer}
                assert scores == pytest.approx(expected, abs=1e-5), (name, way)


class TestPushWithLocalBase:
    @pytest.mark.parametrize("by", ["model", "trainer"])
    def test_warns_and_asks_for_an_id(self, logged, by):
        (message,) = logged[by]
        assert TINY_CLIP in message and "base_model_name_or_path to the Hub id" in message

    @pytest.mark.parametrize("action", ["save", "corrected"])
    def test_saving_and_pushing_with_an_id_do_not_warn(self, logged, action):
        assert logged[action] == []

    @pytest.mark.parametrize("repo_id", ["me/local-by-model", "me/local-by-trainer"])
    def test_card_holds_no_path_of_this_machine(self, hub, pusher, repo_id):
        card = card_of(hub, repo_id)
        assert str(ROOT) not in str(card) and "/tmp" not in str(card)
        assert card.data.base_model is None
        assert "`tiny_clip`, a folder (not on the Hub" in card.text

    def test_the_id_given_afterwards_is_in_card_and_config(self, hub, pusher):
        card = card_of(hub, "me/local-corrected")
        assert card.data.base_model == hub_client.BASE
        assert f"base_model:adapter:{hub_client.BASE}" in card.data.tags
        config = json.loads(hub.repos["me/local-corrected"]["adapter_config.json"])
        assert config["base_model_name_or_path"] == hub_client.BASE


def test_a_fresh_process_loads_it_by_id_in_every_way_with_equal_logits(loader, logits_pushed):
    loaded = load_file(loader / "loaded.safetensors")
    assert set(loaded) == {"auto", "auto_from_push_by_model", "classifier", "peft_model", "load_adapter"}
    for logits in loaded.values():
        assert_close(logits, logits_pushed, rtol=0, atol=1e-5)  # CLIPModel runs each prompt in a row of its own


class TestFailingPush:
    @pytest.mark.parametrize(
        ("case", "status"), [("refused", 401), ("breaks_down", 500), ("breaks_down_under_trainer", 500)]
    )
    def test_raises_what_the_hub_answered(self, pusher, case, status):
        outcome = json.loads((pusher / "push_outcomes.json").read_text())[case]
        assert outcome["type"] == "HfHubHTTPError"
        assert str(status) in outcome["message"] and f"stand-in answers {status}" in outcome["message"]

    def test_leaves_nothing_on_the_hub(self, hub, pusher):
        assert hub.repos["me/push-refused"] == {} and hub.repos["me/push-breaks-down"] == {}

    def test_leaves_the_adapter_on_this_machine_intact(self, pusher):
        before, after, of_trainer = (
            (pusher / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after", "failed_run")
        )
        assert before == after == of_trainer


class TestFailingLoad:
    @pytest.fixture
    def outcomes(self, loader):
        return json.loads((loader / "load_outcomes.json").read_text())

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("no-access", "401"),
            ("nowhere", "is not a local folder and is not a valid model identifier"),
            ("breaks-down", "500"),
            ("breaks-off", "adapter_model.safetensors of 'me/breaks-off' could not be downloaded"),
        ],
    )
    def test_raises_an_os_error_that_names_the_repository(self, outcomes, name, said):
        outcome = outcomes[name]
        assert outcome["is_os_error"] and said in outcome["message"] and f"me/{name}" in outcome["message"]

    def test_refuses_pickled_weights_without_fetching_them(self, hub, outcomes):
        assert outcomes["pickled"]["type"] == "ValueError" and "pickles" in outcomes["pickled"]["message"]
        assert not [request for request in hub.requests if "adapter_model.bin" in request]

    def test_does_not_hinder_other_repositories(self, outcomes):
        assert outcomes["by-trainer"] is None

    def test_a_download_that_broke_off_is_whole_the_next_time(self, loader, logits_pushed):
        assert_close(load_file(loader / "recovered.safetensors")["logits"], logits_pushed, rtol=0, atol=0)
