"""The Python snippets of README and of the docs run as they are printed, one after the other.

Nothing in them is replaced: the stand-in of the Hub serves the embedded tiny CLIP under the name of the published one.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_snippets
from conftest import ROOT, TINY_CLIP
from hub_stand_in import HubStandIn
from open_clip_cases import with_openai_s_vocabulary
from readme_snippets import DOCUMENTS, snippets_of


README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Each line in a process of its own, in which the later documents go on from the earlier ones, as their text says.
LATER = ("data", "methods", "training", "hub", "export", "scaling", "uncertainty", "test_time")
CHAINS = [
    [README, *(DOCS / f"{name}.md" for name in LATER)],
    [DOCS / "lora_beside_prompts.md"],
    [DOCS / "families.md"],
    [DOCS / "open_clip.md"],
    [DOCS / "distillation.md"],
]
ARE_NOT_RUN = {ROOT / "CONTRIBUTING.md"}  # changes to the library itself


def quick_start():
    """The first snippet of README, and the output that is shown for it."""
    section = README.read_text(encoding="utf-8").partition("## Quick start")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```\n\n    (.*?)\n", section, re.DOTALL).groups()


def test_the_quick_start_has_15_lines():
    snippet, _ = quick_start()
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 15
    assert max(map(len, snippet.splitlines())) <= 119 and ";" not in snippet


def test_all_fences_of_python_are_found():
    for document in DOCUMENTS:
        languages = re.findall(r"^ *```(.*)", document.read_text(encoding="utf-8"), re.MULTILINE)[::2]
        assert set(languages) <= {"bash", "python"}, document
        assert languages.count("python") == len(snippets_of(document)) or document in ARE_NOT_RUN, document


def test_all_documents_with_snippets_are_run():
    with_snippets = {document for document in DOCUMENTS if snippets_of(document)}
    assert with_snippets - ARE_NOT_RUN == {document for chain in CHAINS for document in chain}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubStandIn() as hub:
        files = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
        for name in ("openai/clip-vit-base-patch16", "patrickjohncyh/fashion-clip"):
            hub.repos[name] = files
        folder = with_openai_s_vocabulary(tmp_path_factory.mktemp("open_clip"))
        hub.repos["imageomics/bioclip-2"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        yield hub


@pytest.mark.slow  # a process that trains
@pytest.mark.parametrize("documents", CHAINS, ids=lambda documents: documents[0].stem)
def test_all_snippets_run(documents, hub, tmp_path):
    pytest.importorskip("onnxruntime")
    environment = hub.client_environment(tmp_path / "home")
    folder = tmp_path / "work"
    folder.mkdir()

    command = [sys.executable, run_snippets.__file__, *map(str, documents)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr and "torchvision" not in done.stderr, done.stderr
    for document in documents:
        assert f"--- {document.name}, snippet {len(snippets_of(document))}\n" in done.stdout
    if documents[0] == README:
        assert (folder / "pets-prompts" / "adapter_config.json").exists()
        check_shown_accuracies(done.stdout)


def check_shown_accuracies(printed):
    _, shown = quick_start()
    found = re.search(r"^([\d.]+)% -> ([\d.]+)% (\w+)$", printed, re.MULTILINE)
    before, after = map(float, found.group(1, 2))
    shown_before, shown_after = map(float, re.findall(r"([\d.]+)%", shown))
    assert before == shown_before and after > before + 2
    assert abs(after - shown_after) < 2  # the last digits depend on the machine
    assert found.group(3) == shown.split()[-1]
