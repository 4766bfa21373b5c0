"""The command `serve` under load: good and bad requests from many threads, while adapters come and go.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --requests 20000 --threads 32

The service runs in a process of its own, on this machine. Prints tables in Markdown; ends with an error if a good
request did not get its answer, or a bad one not its refusal.
"""

from __future__ import annotations

import argparse
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import psutil
import requests
import torch
from peft import get_peft_model
from PIL import Image

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP


CLASS_NAMES = {"pets": ["cat", "dog"], "meals": ["cake", "bread", "tea"]}
COMING_AND_GOING = "extra"
NUM_PARTS = 5  # memory is read after each
TOLERANCE = 1e-5


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder))
        with Service(Path(folder)) as service:
            outcomes = run_load(service, args.requests, args.threads)
    print_tables(outcomes)
    wrong = [outcome for outcome in outcomes if not outcome[1]]
    if wrong:
        sys.exit(f"{len(wrong)} requests were answered wrongly: {Counter(kind for kind, *_ in wrong)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=16)
    return parser.parse_args()


def make_adapters(folder: Path) -> None:
    """Two that stay loaded, one that comes and goes, and one that is damaged."""
    for seed, (name, class_names) in enumerate(CLASS_NAMES.items()):
        torch.manual_seed(seed)
        base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names)
        config = CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=4)
        get_peft_model(base, config).save_pretrained(folder / name)
    for copy in (COMING_AND_GOING, "damaged"):
        shutil.copytree(folder / "pets", folder / copy)
    weights = folder / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


class Service:
    """The command `serve` in a process of its own."""

    def __init__(self, adapters: Path) -> None:
        self.adapters = adapters

    def __enter__(self) -> Service:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = ["-m", "clip_prompt_peft.commands.serve", "--adapters", self.adapters, "--port", port]
        self.log = open(self.adapters / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=self.log, stderr=subprocess.STDOUT
        )
        self.url = f"http://127.0.0.1:{port}"
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError((self.adapters / "log").read_text())
            time.sleep(0.2)
        for name in requests.get(f"{self.url}/adapters").json()["loaded"]:
            if name not in CLASS_NAMES:  # the service loads all that are there
                requests.delete(f"{self.url}/adapters/{name}").raise_for_status()
        return self

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/adapters").ok
        except requests.ConnectionError:
            return False

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def memory(self) -> float:
        """MiB"""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def classify(self, *images: bytes, **form) -> requests.Response:
        files = [("images", (f"picture-{i}", image)) for i, image in enumerate(images)]
        return requests.post(f"{self.url}/classify", files=files, data=form)

    def hang_up(self) -> None:
        """Starts an upload, and goes."""
        with socket.create_connection(("127.0.0.1", int(self.url.rsplit(":")[-1]))) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n--x\r\n")


def picture(seed: int) -> bytes:
    pixels = torch.randint(256, (50, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(4)]
# What is asked, and what a right answer to it is: probabilities known from before the load, or a status.
GOOD = [
    *[{"images": [image], "adapters": name} for image in PICTURES for name in CLASS_NAMES],
    {"images": PICTURES[:2], "adapters": ["pets", "meals"]},
    {"images": PICTURES[:1], "class_names": ["red", "green", "blue"]},
    {"images": PICTURES[2:], "class_names": ["cat", "dog"]},
]
BAD = [
    (415, {"images": [b"this is no image"], "adapters": "pets"}),
    (422, {"images": [PICTURES[0], PICTURES[1][:-900]], "adapters": "meals"}),
    (404, {"images": PICTURES[:1], "adapters": "birds"}),
    (422, {"images": PICTURES[:1], "class_names": ["cat", "cat"]}),
    (422, {"images": PICTURES[:1]}),
    (413, {"images": [b"x" * 11 * 2**20], "adapters": "pets"}),
]


def ask(service: Service, question: dict) -> requests.Response:
    form = {key: value for key, value in question.items() if key != "images"}
    return service.classify(*question["images"], **form)


def probabilities(response: requests.Response) -> list[dict[str, float]]:
    return [{label["label"]: label["probability"] for label in image["labels"]} for image in response.json()]


def is_near(found: list[dict], expected: list[dict]) -> bool:
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(abs(a[label] - b[label]) < TOLERANCE for label in a)
        for a, b in zip(found, expected)
    )


Outcome = tuple[str, bool, float]  # kind of request, whether its answer was right, seconds


class Load:
    """Requests of all kinds, and whether they are answered rightly."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.expected = [probabilities(ask(service, question)) for question in GOOD]
        self.extra = probabilities(ask(service, {"images": PICTURES[:1], "adapters": "pets"}))
        self.coming_and_going = threading.Lock()

    def good(self, chance: random.Random) -> bool:
        index = chance.randrange(len(GOOD))
        response = ask(self.service, GOOD[index])
        return response.status_code == 200 and is_near(probabilities(response), self.expected[index])

    def bad(self, chance: random.Random) -> bool:
        status, question = chance.choice(BAD)
        return ask(self.service, question).status_code == status

    def hang_up(self, chance: random.Random) -> bool:
        self.service.hang_up()
        return True

    def damaged_adapter(self, chance: random.Random) -> bool:
        return requests.put(f"{self.service.url}/adapters/damaged").status_code == 422

    def load_and_unload(self, chance: random.Random) -> bool:
        url = f"{self.service.url}/adapters/{COMING_AND_GOING}"
        with self.coming_and_going:
            return requests.put(url).status_code == 200 and requests.delete(url).status_code == 204

    def adapter_that_comes_and_goes(self, chance: random.Random) -> bool:
        """Gets its answer, or is told that it is not there."""
        response = ask(self.service, {"images": PICTURES[:1], "adapters": COMING_AND_GOING})
        return response.status_code == 404 or is_near(probabilities(response), self.extra)


KINDS = {  # and how often
    "good": 60,
    "bad": 20,
    "hang_up": 5,
    "damaged_adapter": 5,
    "load_and_unload": 5,
    "adapter_that_comes_and_goes": 5,
}


def run_load(service: Service, num_requests: int, num_threads: int) -> list[Outcome]:
    load, chance = Load(service), random.Random(0)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=num_requests)
    print(f"| requests | seconds | MiB of the service |\n|---|---|---|\n| 0 | 0 | {service.memory():.0f} |")

    def one(number: int, kind: str) -> Outcome:
        start = time.perf_counter()
        is_right = getattr(load, kind)(random.Random(number))
        return kind, is_right, time.perf_counter() - start

    outcomes, begin = [], time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for part in range(NUM_PARTS):
            numbers = range(num_requests * part // NUM_PARTS, num_requests * (part + 1) // NUM_PARTS)
            outcomes += pool.map(one, numbers, (kinds[number] for number in numbers))
            seconds = time.perf_counter() - begin
            print(f"| {len(outcomes):,} | {seconds:.0f} | {service.memory():.0f} |", flush=True)
    return outcomes


def print_tables(outcomes: list[Outcome]) -> None:
    print("\n| kind | requests | answered rightly | median, ms | 95 %, ms |\n|---|---|---|---|---|")
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome[0] == kind]
        if len(of_kind) > 1:
            percentiles = statistics.quantiles([1000 * seconds for *_, seconds in of_kind], n=20)
            right = sum(is_right for _, is_right, *_ in of_kind)
            print(f"| {kind} | {len(of_kind):,} | {right:,} | {percentiles[9]:.0f} | {percentiles[18]:.0f} |")


if __name__ == "__main__":
    main()
