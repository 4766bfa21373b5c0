"""What the tests share: the embedded CLIP and the golden numbers. No test reaches the network."""

import json
import os
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path


# Where tests/gpu runs: on the card with `pytest -m gpu tests/gpu`, or where GPU_TESTS_DEVICE says. Everything else
# runs on the CPU, also with a card in the machine and in processes that tests start, since the Trainer takes a card by
# itself. All this is settled before torch is imported; workers of pytest-xdist inherit it.
if re.search(r"(^| )-m ?gpu( |$)", " ".join(sys.argv[1:])):
    os.environ.setdefault("GPU_TESTS_DEVICE", "cuda")
GPU_TESTS_DEVICE = os.environ.get("GPU_TESTS_DEVICE")
if GPU_TESTS_DEVICE is None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: models this small only lose by more threads

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel  # noqa: E402

import clip_prompt_peft  # noqa: E402, F401  (registers the method with peft)
from clip_prompt_peft.assets import ASSETS, TINY_CLIP  # noqa: E402


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
EMOJI = ASSETS / "emoji"
GOLDEN = ROOT / "tests" / "golden"
CLASS_NAMES = ["animal", "plant", "food", "vehicle"]

# With older ones torch.compile breaks off, with an error, on one model or another; 2.6 to 2.11 were tried.
needs_compile = pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch.compile of torch 2.10 or newer")


def slow_param(value):
    """A case of a large table that a quick run leaves out."""
    return pytest.param(value, marks=pytest.mark.slow)


# For state machines: a short run in the suite, always the same; HYPOTHESIS_PROFILE=nightly for a long one.
settings.register_profile("suite", max_examples=10, stateful_step_count=12, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=120, stateful_step_count=25, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture
def device():
    """Where a test of tests/gpu computes. `GPU_TESTS_DEVICE=cpu pytest tests/gpu` tries them without a card."""
    if GPU_TESTS_DEVICE is None or (GPU_TESTS_DEVICE == "cuda" and not torch.cuda.is_available()):
        pytest.skip("needs a card, and is asked for by: pytest -m gpu tests/gpu")
    return torch.device(GPU_TESTS_DEVICE, 0) if GPU_TESTS_DEVICE == "cuda" else torch.device(GPU_TESTS_DEVICE)


@pytest.fixture(params=["stand-in", pytest.param("CUDA", marks=pytest.mark.gpu)])
def place(request):
    """The device that a test computes on."""
    if request.param == "stand-in":
        return torch.device("cpu")
    device = request.getfixturevalue("device")
    if device.type != "cuda":
        pytest.skip("the stand-in is tried by itself")
    return device


@pytest.fixture
def card(place):
    if place.type != "cuda":
        pytest.skip("needs a card")
    return place


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def datasets_with_caching():
    """Benchmarks switch the caching of `datasets` off for the whole process."""
    yield
    if "datasets" in sys.modules:
        sys.modules["datasets"].enable_caching()


@pytest.fixture
def clip():
    return CLIPModel.from_pretrained(TINY_CLIP).eval()


@pytest.fixture
def classifier():
    return clip_prompt_peft.CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_CLIP)


@pytest.fixture(scope="session")
def image_processor():
    return AutoImageProcessor.from_pretrained(TINY_CLIP)


@pytest.fixture
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def texts(tokenizer):
    return tokenizer(["a photo of a animal.", "a photo of a fire truck."], padding=True, return_tensors="pt")


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 3, 1])


@pytest.fixture(
    params=[0, slow_param(1), 2, 3], ids=["CLIPModel", "CLIPTextModelWithProjection", "CLIPTextModel", "classifier"]
)
def case(request, tokenizer, pixel_values, labels):
    """Every model with a CLIP text tower, one after the other."""
    from cases import MODEL_CLASSES, Case

    return Case(MODEL_CLASSES[request.param], tokenizer, pixel_values, labels)


@pytest.fixture(scope="module")
def sizes_as_in_a_real_model():
    """So small a model would be compared whole before class embeddings are used again. With this, only the adapters
    and the position table are, and the matrices are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_prompt_peft.text.cache.SMALL", 10_000)
        yield


class GoldenCase:
    """Numbers that the original authors' code computed; see tests/golden/README.md."""

    def __init__(self, name):
        self.name = name
        self.info = json.loads((GOLDEN / "public" / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / "public" / f"{name}.safetensors")
        inputs = load_file(GOLDEN / "public" / self.info.get("inputs_file", "inputs.safetensors"))
        key = self.info.get("inputs_key")  # without one, the inputs are among the tensors
        self.pixel_values, self.labels = inputs.get(f"{key}.pixel_values"), inputs.get(f"{key}.labels")

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.fixture
def golden():
    return GoldenCase


def golden_base_folder(kind, tmp_path):
    """Folder of the small random CLIP of the golden numbers, with a "legacy_eos" or "fixed_eos" configuration."""
    base = GOLDEN / "base"
    if kind == "legacy_eos":
        return str(base)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(base / name)
    (tmp_path / "config.json").write_text((base / "config_eos_fixed.json").read_text())
    return str(tmp_path)


@pytest.fixture(params=["legacy_eos", slow_param("fixed_eos")])
def golden_base(request, tmp_path):
    """The base model of the golden numbers, with either kind of end token configuration."""
    return golden_base_folder(request.param, tmp_path)


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Runs a command (`"train"`) or an example (`"run_prompt_tuning.py"`) in this process, which saves the time to
    import everything, and returns what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            if name.endswith(".py"):
                sys.argv[0] = str(EXAMPLES / name)
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                import_module(f"clip_prompt_peft.commands.{name}").main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@pytest.fixture
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def run_benchmark(benchmarks_on_path, monkeypatch, capfd):
    """Runs a benchmark in this process, and returns the cells of the table that it prints, without the header."""

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__file__, *arguments])
        module.main()
        rows = [line.strip("|").split("|") for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in row] for row in rows[2:]]

    return run
