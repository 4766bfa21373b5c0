"""The path of a new user: photos of one's own to an adapter, a report, answers, a service and files for elsewhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import EXAMPLES, TINY_CLIP
from PIL import Image, ImageDraw
from running_commands import run_command


pytestmark = pytest.mark.slow  # a process for each step

SHAPES = {"red circle": "red", "café bleu": "blue", "Grün Gras": "green", "night": "black", "gold bar": "gold"}
NUM_PHOTOS = 8


def draw_photos(folder):
    """Draws photos of five classes, which differ in shape and color, and in size and place within a class."""
    for name, color in SHAPES.items():
        (folder / name).mkdir(parents=True)
        for index in range(NUM_PHOTOS):
            image = Image.new("RGB", (80, 64), "white")
            corner = (4 + 3 * index, 4 + index)
            box = (*corner, corner[0] + 24 + 2 * index, corner[1] + 20 + 3 * index)
            shape = ImageDraw.Draw(image)
            (shape.ellipse if name == "red circle" else shape.rectangle)(box, fill=color)
            image.save(folder / name / f"photo {index}.jpg")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a space in its path, which holds photos, and an adapter that was tuned on them."""
    home = tmp_path_factory.mktemp("first hour") / "my work"
    draw_photos(home / "photos")
    code, printed, errors = run_command("train", *TRAIN, folder=home)
    assert code == 0, printed + errors
    assert "Traceback" not in errors and "Warning" not in errors
    assert f"clip-prompt predict '{OUT}/seed1' IMAGE ..." in printed
    return home


OUT = "outputs/my photos"
# as in README, with the model that needs no download and as many shots as there are photos left of each class
TRAIN = ["--model_name_or_path", TINY_CLIP, "--train_dir", "photos", "--shots", 6, "--output_dir", OUT]


def test_the_adapter_lies_in_a_folder_of_its_seed(home):
    assert sorted(path.name for path in (home / OUT).iterdir()) == ["results.json", "seed1"]
    results = json.loads((home / OUT / "results.json").read_text())
    assert results["tuned"][0]["held out of train"]["accuracy"] >= 0.8
    card = (home / OUT / "seed1/README.md").read_text()
    assert "- Data set: `photos`\n" in card and "- Epochs: `300`\n" in card


def test_the_report_tests_on_the_images_that_were_held_out(home):
    code, printed, errors = run_command("report", OUT, folder=home)
    assert code == 0, errors
    assert "Tested on" in printed and "'held out of train' (8 images)" in printed
    accuracy = json.loads((home / OUT / "results.json").read_text())["tuned"][0]["held out of train"]["accuracy"]
    assert f"tuned: accuracy {accuracy:.1%}" in printed
    assert "café bleu" in (home / "report.html").read_text(encoding="utf-8")


def test_photos_are_classified(home):
    code, printed, errors = run_command("predict", OUT, "photos/café bleu/photo 0.jpg", "photos/night", folder=home)
    assert code == 0, errors
    assert "café bleu" in printed.splitlines()[2] and len(printed.splitlines()) == 2 + 1 + NUM_PHOTOS


def test_the_service_answers_and_stops_in_one_line(home):
    requests = pytest.importorskip("requests")
    pytest.importorskip("fastapi")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "clip_prompt_peft.commands.serve", "--adapters", OUT, "--port", str(port)]
    service = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(3000):  # on a busy machine the imports alone may take minutes
            try:
                requests.get(f"http://127.0.0.1:{port}/adapters", timeout=5)
                break
            except requests.ConnectionError:
                assert service.poll() is None, service.stderr.read()
                time.sleep(0.1)
        photo = (home / "photos/café bleu/photo 0.jpg").read_bytes()
        answer = requests.post(
            f"http://127.0.0.1:{port}/classify", files={"images": photo}, data={"adapters": "seed1"}, timeout=60
        )
        assert answer.json()[0]["labels"][0]["label"] == "café bleu"
        service.send_signal(signal.SIGINT)
        _, errors = service.communicate(timeout=60)
    finally:
        service.kill()
    assert service.returncode == 130
    assert "Traceback" not in errors and errors.splitlines()[-1] == "Stopped."


def test_the_exported_classifier_runs_elsewhere(home, monkeypatch):
    pytest.importorskip("onnxruntime")
    code, printed, errors = run_command("export", OUT, "photos onnx", "--test_dir", "photos", folder=home)
    assert code == 0, errors
    assert printed.startswith("Wrote photos onnx: model.onnx (") and "on 40 images\n" in printed
    monkeypatch.chdir(home)
    command = [sys.executable, EXAMPLES / "classify_onnx.py", "photos onnx", "photos/night/photo 3.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "night" in done.stdout.splitlines()[0]
