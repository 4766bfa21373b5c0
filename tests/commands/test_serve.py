"""Tests of the command `serve`, over real HTTP on this machine."""

import http.client
import json
import re
import shutil
import struct
import threading
import time
import zlib
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_CLIP
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    method_config,
)
from clip_prompt_peft.commands.serve import main as serve_main
from clip_prompt_peft.evaluation.conformal import ConformalClassifier


uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
requests = pytest.importorskip("requests")

MAX_UPLOAD = 2**20


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with adapters that work, some that do not, and things outside of it that must not be reached."""
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "adapters"
    for seed, (name, class_names) in enumerate({"pets": ["cat", "dog"], "meals": ["cake", "bread", "tea"]}.items()):
        torch.manual_seed(seed)
        base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names)
        config = CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=4)
        get_peft_model(base, config).save_pretrained(folder / name)
    shutil.copytree(folder / "pets", outside / "secret")
    (folder / "linked").symlink_to(outside / "secret")
    shutil.copytree(folder / "pets", folder / "damaged")
    weights = (folder / "pets" / "adapter_model.safetensors").read_bytes()
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(weights[:-100])
    shutil.copytree(folder / "pets", folder / "other-size")
    config = json.loads((folder / "pets" / "adapter_config.json").read_text())
    config |= {"num_virtual_tokens": 2, "replaced_token_ids": config["replaced_token_ids"][:2]}
    (folder / "other-size" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "pets", folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(folder / "pickled" / "adapter_model.bin")
    lora = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def url(adapters):
    from clip_prompt_peft.commands.service import AdapterStore, create_app

    store = AdapterStore(TINY_CLIP, adapters, max_loaded=2)
    config = uvicorn.Config(create_app(store, MAX_UPLOAD), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def loaded(url):
    """The service with both adapters loaded, and with none afterwards."""
    for name in ("pets", "meals"):
        assert requests.put(f"{url}/adapters/{name}").status_code == 200
    yield url
    for name in requests.get(f"{url}/adapters").json()["loaded"]:
        assert requests.delete(f"{url}/adapters/{name}").status_code == 204


def picture(size=(60, 50), seed=0, **save):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, **{"format": "PNG", **save})
    return file.getvalue()


def blank(size, mode="L"):
    file = BytesIO()
    Image.new(mode, size).save(file, format="PNG")
    return file.getvalue()


def claims(width, height):
    """A PNG of some bytes that says it is very large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + picture()[33:]
    )


def classify(url, *images, **form):
    files = [("images", (f"picture-{i}", image)) for i, image in enumerate(images)]
    return requests.post(f"{url}/classify", files=files, data=form)


def probabilities(answer):
    return {label["label"]: label["probability"] for label in answer["labels"]}


def expected(folder, image):
    model = AutoPeftModelForPromptClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(TINY_CLIP)(Image.open(BytesIO(image)), return_tensors="pt")
    with torch.no_grad():
        values = model(**pixels).logits[0].softmax(dim=0)
    return dict(zip(model.get_base_model().class_names, values.tolist()))


def test_adapters_are_listed_loaded_and_unloaded_at_run_time(url):
    def state():
        return requests.get(f"{url}/adapters").json()

    before = state()
    assert before["loaded"] == {}
    assert {"pets", "meals"} <= set(before["available"])
    assert "linked" not in before["available"]
    loaded = requests.put(f"{url}/adapters/pets")
    assert (loaded.status_code, loaded.json()) == (200, ["cat", "dog"])
    assert state()["loaded"] == {"pets": ["cat", "dog"]}
    assert requests.delete(f"{url}/adapters/pets").status_code == 204
    assert state() == before
    assert requests.put(f"{url}/adapters/pets").status_code == 200  # and again
    assert requests.delete(f"{url}/adapters/pets").status_code == 204


def test_an_image_gets_the_probabilities_of_its_adapter(loaded, adapters):
    image = picture()
    answer = classify(loaded, image, adapters="meals")
    assert answer.status_code == 200
    assert answer.json()[0]["adapter"] == "meals"
    found = probabilities(answer.json()[0])
    assert found == pytest.approx(expected(adapters / "meals", image), abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    (only,) = classify(loaded, image, adapters="meals", top_k=1).json()
    assert only["labels"] == answer.json()[0]["labels"][:1]


def test_images_of_one_request_may_belong_to_different_adapters(loaded, adapters):
    images = [picture(seed=1), picture(seed=2)]
    answer = classify(loaded, *images, adapters=["pets", "meals"]).json()
    for of_image, name, image in zip(answer, ["pets", "meals"], images):
        assert of_image["adapter"] == name
        assert probabilities(of_image) == pytest.approx(expected(adapters / name, image), abs=1e-5)


def test_class_names_of_the_moment_are_scored_zero_shot_and_change_no_adapter(loaded, adapters):
    image = picture(format="JPEG")
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["red", "blue"]).eval()
    pixels = AutoImageProcessor.from_pretrained(TINY_CLIP)(Image.open(BytesIO(image)), return_tensors="pt")
    with torch.no_grad():
        values = model(**pixels).logits[0].softmax(dim=0).tolist()
    (answer,) = classify(loaded, image, class_names=["red", "blue"]).json()
    assert answer["adapter"] is None
    assert probabilities(answer) == pytest.approx(dict(zip(["red", "blue"], values)), abs=1e-5)
    (answer,) = classify(loaded, image, adapters="pets").json()
    assert probabilities(answer) == pytest.approx(expected(adapters / "pets", image), abs=1e-5)


def test_a_photo_that_lies_on_its_side_is_turned_upright(loaded):
    upright, exif = Image.open(BytesIO(picture())), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it
    file = BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, format="PNG", exif=exif)
    lying, straight = (classify(loaded, image, adapters="meals").json() for image in (file.getvalue(), picture()))
    assert probabilities(lying[0]) == pytest.approx(probabilities(straight[0]), abs=1e-6)


@pytest.mark.parametrize(
    ("image", "status", "message"),
    [
        (b"this is no image", 415, "not an image"),
        (b"", 415, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image"),
        (picture(format="TIFF"), 415, "formats JPEG, PNG"),
        (picture()[:-900], 422, "damaged"),
        (picture()[:20], 422, "damaged"),
        (claims(60_000, 60_000), 413, "too many pixels"),
        (claims(9_000, 9_000), 413, "9000 x 9000 pixels; at most 50,000,000"),
        (blank((8000, 8000)), 413, "8000 x 8000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_usable_image_is_refused_and_changes_nothing(loaded, image, status, message):
    good = picture()
    before = classify(loaded, good, adapters="pets").json(), requests.get(f"{loaded}/adapters").json()
    answer = classify(loaded, good, image, adapters="pets")
    assert answer.status_code == status
    assert message in answer.json()["detail"] and "picture-1" in answer.json()["detail"]
    assert (classify(loaded, good, adapters="pets").json(), requests.get(f"{loaded}/adapters").json()) == before


def test_the_only_adapter_answers_where_none_is_named(url):
    assert classify(url, picture()).status_code == 422
    assert requests.put(f"{url}/adapters/pets").status_code == 200
    named, unnamed = classify(url, picture(), adapters="pets"), classify(url, picture())
    zero_shot = classify(url, picture(), class_names=["cat", "dog"]).json()
    assert requests.delete(f"{url}/adapters/pets").status_code == 204
    assert unnamed.status_code == 200
    assert unnamed.json() == named.json() and unnamed.json()[0]["adapter"] == "pets"
    assert zero_shot[0]["adapter"] is None


@pytest.mark.parametrize(
    ("form", "status", "message"),
    [
        ({}, 422, "Give either adapters or class_names; the adapters ['meals', 'pets'] are loaded"),
        ({"adapters": "pets", "class_names": "cat"}, 422, "Give either adapters or class_names"),
        ({"adapters": "birds"}, 404, "'birds' is not loaded; loaded are ['meals', 'pets']"),
        ({"adapters": "-untrained"}, 404, "'-untrained' is not loaded"),
        ({"adapters": "__base__"}, 404, "'__base__' is not loaded"),
        ({"adapters": ["pets", "pets"]}, 422, "got 2 for 1 images"),
        ({"class_names": ["cat", "cat"]}, 422, "stand there twice"),
        ({"class_names": ["cat", " "]}, 422, "is empty"),
        ({"class_names": "very " * 90}, 422, "77 positions"),
        ({"class_names": [f"class {i}" for i in range(501)]}, 413, "501 class names are too many"),
        ({"adapters": "pets", "top_k": 0}, 422, "greater than or equal to 1"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused_and_change_nothing(loaded, form, status, message):
    before = classify(loaded, picture(), adapters="pets").json()
    answer = classify(loaded, picture(), **form)
    assert answer.status_code == status
    assert message in str(answer.json()["detail"])
    assert classify(loaded, picture(), adapters="pets").json() == before


def test_a_service_with_nothing_to_serve_does_not_start(tmp_path, capsys):
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "dog"])
    get_peft_model(classifier, method_config("zs-lp", classifier)).save_pretrained(tmp_path / "head")
    with pytest.raises(SystemExit, match="can be served, for the reasons printed above"):
        serve_main([str(tmp_path / "head"), "--port", "0"])
    assert "the service takes adapters of prompts" in capsys.readouterr().err


def test_a_request_without_or_with_too_many_images_is_refused(loaded):
    assert requests.post(f"{loaded}/classify", data={"adapters": "pets"}).status_code == 422
    answer = classify(loaded, *[picture((4, 4))] * 17, adapters="pets")
    assert answer.status_code == 413 and "at most 16" in answer.json()["detail"]


def send_long_body(url, headers, parts):
    """Sends until the other side hangs up, and reads what it has said."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/classify")
    for name, value in {"Content-Type": "multipart/form-data; boundary=x", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    sent = 0
    try:
        for part in parts:
            connection.send(part)
            sent += len(part)
    except (BrokenPipeError, ConnectionResetError):
        pass
    response = connection.getresponse()
    answer = SimpleNamespace(status=response.status, detail=json.load(response)["detail"], sent=sent)
    connection.close()
    return answer


START = b'--x\r\nContent-Disposition: form-data; name="images"; filename="big"\r\n\r\n'
PART = bytes(2**16)
HUNDRED_MB = 100 * 2**20


def test_an_upload_of_100_mb_is_refused_before_it_is_read(loaded):
    parts = [START] + [PART] * (HUNDRED_MB // len(PART))
    answer = send_long_body(loaded, {"Content-Length": str(HUNDRED_MB + len(START))}, parts)
    assert answer.status == 413 and "at most 1,048,576 bytes" in answer.detail
    assert answer.sent < HUNDRED_MB / 4
    assert classify(loaded, picture(), adapters="pets").status_code == 200


def test_an_upload_that_does_not_tell_its_length_is_cut_off(loaded):
    parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in [START] + [PART] * (HUNDRED_MB // len(PART))]
    answer = send_long_body(loaded, {"Transfer-Encoding": "chunked"}, parts)
    assert answer.status == 413 and "at most 1,048,576 bytes" in answer.detail
    assert answer.sent < HUNDRED_MB / 4
    assert classify(loaded, picture(), adapters="pets").status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("birds", 404),
        ("linked", 404),
        ("..", 422),
        ("%2e%2e", 422),
        ("..%2fsecret", 404),
        ("%2e%2e%2fsecret", 404),
        ("..%5csecret", 422),
        ("%2fetc", 404),
        ("pets%00", 422),
        ("pets.", 422),
        ("-untrained", 422),
        ("__base__", 422),
        ("a" * 300, 422),
        ("damaged", 422),
        ("other-size", 422),
        ("pickled", 422),
        ("lora", 422),
    ],
)
def test_adapters_that_are_not_there_or_damaged_or_elsewhere_are_refused_and_change_nothing(url, path, status):
    assert requests.put(f"{url}/adapters/pets").status_code == 200
    try:
        before = classify(url, picture(), adapters="pets").json(), requests.get(f"{url}/adapters").json()
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)  # sends the path as it is
        connection.request("PUT", f"/adapters/{path}")
        response = connection.getresponse()
        assert response.status == status
        assert json.load(response)["detail"]
        connection.close()
        assert (classify(url, picture(), adapters="pets").json(), requests.get(f"{url}/adapters").json()) == before
    finally:
        requests.delete(f"{url}/adapters/pets")


def test_loading_twice_or_too_many_and_unloading_what_is_not_there_are_refused(loaded, adapters):
    shutil.copytree(adapters / "pets", adapters / "third", dirs_exist_ok=True)
    again, third = (requests.put(f"{loaded}/adapters/{name}") for name in ("pets", "third"))
    assert again.status_code == 409 and "loaded already" in again.json()["detail"]
    assert third.status_code == 409 and "2 adapters are loaded, which is the limit" in third.json()["detail"]
    for name in ("third", "-untrained", "birds"):
        assert requests.delete(f"{loaded}/adapters/{name}").status_code == 404
    assert set(requests.get(f"{loaded}/adapters").json()["loaded"]) == {"pets", "meals"}


def test_many_at_once_get_their_own_answers(loaded, adapters):
    wanted = {name: expected(adapters / name, picture()) for name in ("pets", "meals")}
    answers = []

    def ask(name):
        answers.append((name, classify(loaded, picture(), adapters=name).json()[0]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("pets", "meals") * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    for name, answer in answers:
        assert probabilities(answer) == pytest.approx(wanted[name], abs=1e-5)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A service with an adapter that is calibrated, one that is not, and one whose scores are another's."""
    from fastapi.testclient import TestClient

    from clip_prompt_peft.commands.service import AdapterStore, create_app

    folder = tmp_path_factory.mktemp("adapters")
    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "dog", "owl"])
    model = get_peft_model(base, CLIPPromptTuningConfig(), adapter_name="sure").eval()
    model.set_temperature(3.0)
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    ConformalClassifier.fit(model, logits=logits, labels=torch.arange(60) % 3, method="lac")
    model.save_pretrained(folder)
    torch.manual_seed(1)
    model.add_adapter("bare", CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=4))
    model.save_pretrained(folder, selected_adapters=["bare"])
    model.set_adapter("bare")
    model.set_conformal_scores(model.peft_config["sure"].conformal_scores)
    model.set_temperature(3.0)
    model.save_pretrained(folder / "copied", selected_adapters=["bare"])
    shutil.move(folder / "copied" / "bare", folder / "wrong")
    shutil.rmtree(folder / "copied")
    (folder / "adapter_config.json").unlink(missing_ok=True)
    store = AdapterStore(TINY_CLIP, folder)
    for name in ("sure", "bare", "wrong"):
        store.load(name)
    return SimpleNamespace(store=store, client=TestClient(create_app(store)), folder=folder)


class TestSetsOfClasses:
    def ask(self, calibrated, *images, **form):
        files = [("images", (f"picture-{i}", image)) for i, image in enumerate(images)]
        return calibrated.client.post("/classify", files=files, data=form)

    def test_come_with_the_temperature_and_say_when_the_model_is_unsure(self, calibrated):
        image = picture()
        folder = calibrated.folder / "sure"
        model = AutoPeftModelForPromptClassification.from_pretrained(folder)
        assert model.temperature == 3.0
        processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
        for coverage in (0.05, 0.5, 0.9):
            (answer,) = self.ask(calibrated, image, adapters="sure", coverage=coverage, max_set_size=2).json()
            assert probabilities(answer) == pytest.approx(expected(folder, image), abs=1e-4)
            sets = ConformalClassifier(model, processor).predict_set([Image.open(BytesIO(image))], coverage)
            assert [entry["label"] for entry in answer["in_set"]] == sets.names[0]
            assert answer["is_unsure"] == (not 1 <= len(sets.names[0]) <= 2)
        (answer,) = self.ask(calibrated, image, adapters="sure").json()
        assert set(answer) == {"adapter", "labels"}

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            ({"adapters": "bare", "coverage": 0.9}, "'bare' gives no sets of classes: The model has no scores"),
            ({"adapters": "wrong", "coverage": 0.9}, "'wrong' gives no sets of classes: .* another model"),
            ({"class_names": ["a", "b"], "coverage": 0.9}, "coverage goes with adapters that were calibrated"),
            ({"adapters": "sure", "coverage": 1.0}, "less than 1"),
            ({"adapters": "sure", "coverage": 0.9, "max_set_size": 0}, "greater than or equal to 1"),
        ],
    )
    def test_are_refused_with_the_reason(self, calibrated, form, message):
        answer = self.ask(calibrated, picture(), **form)
        assert answer.status_code == 422 and re.search(message, json.dumps(answer.json()))
        assert self.ask(calibrated, picture(), adapters="sure", coverage=0.9).status_code == 200

    def test_are_checked_anew_for_an_adapter_that_is_loaded_anew(self, calibrated):
        assert self.ask(calibrated, picture(), adapters="sure", coverage=0.9).status_code == 200
        calibrated.store.unload("sure")
        assert "sure" not in calibrated.store._checked_scores
        calibrated.store.load("sure")
        assert self.ask(calibrated, picture(), adapters="sure", coverage=0.9).status_code == 200
