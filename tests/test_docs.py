"""The reference shows every public name, and README's links lead somewhere on the package index and on the site."""

import importlib
import re
import runpy

import pytest
from conftest import ROOT

import clip_prompt_peft


DOCS = ROOT / "docs"
HOOKS = runpy.run_path(str(DOCS / "hooks.py"))
ADDRESS = "https://example.org/me/clip_prompt_peft"


def paths_of_reference():
    shown = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    return re.findall(r"^::: (\S+)$", shown, re.MULTILINE)


@pytest.mark.parametrize("module", ["", ".data", ".protocols", ".regularizers"])
def test_the_reference_shows_every_public_name(module):
    names = importlib.import_module(f"clip_prompt_peft{module}").__all__
    shown = {path.rpartition(".")[2] for path in paths_of_reference() if path.startswith(f"clip_prompt_peft{module}.")}
    assert set(names) - shown == set()


def test_what_the_reference_shows_is_there_once():
    paths = paths_of_reference()
    assert len(paths) == len(set(paths))
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_readme_on_the_package_index_has_no_relative_links():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = HOOKS["absolute_links"](readme, ADDRESS)
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    targets = [link or picture for link, picture in targets]
    assert f"{ADDRESS}/raw/main/docs/report.png" in targets and f"{ADDRESS}/blob/main/docs/data.md" in targets
    assert all(target.startswith("https://") for target in targets)
    for path in re.findall(rf"{ADDRESS}/(?:raw|blob)/main/([^)\"#]+)", text):
        assert (ROOT / path).exists(), path


def test_without_an_address_words_stay_and_pictures_go():
    text = HOOKS["absolute_links"](
        'See [the page](docs/a.md), [peft](https://x.org) and [above](#top).\n\n<img src="docs/a.png">![b](b.png)\n\n'
        "```python\nx[0](y)\n```\n",
        "",
    )
    assert text == "See the page, [peft](https://x.org) and [above](#top).\n\n\n\n```python\nx[0](y)\n```\n"


def test_links_of_the_site_lead_to_pages_or_to_the_repository():
    with_links = HOOKS["with_links_of_the_site"]
    assert with_links("[a](docs/data.md#formats)", "README.md") == "[a](data.md#formats)"
    assert with_links("[a](../README.md#install) [b](hub.md)", "docs/data.md") == "[a](index.md#install) [b](hub.md)"
    assert with_links("[a](../../CONTRIBUTING.md)", "docs/reference/data.md") == "[a](../contributing.md)"
    outside = with_links("[a script](../examples/classify_onnx.py)", "docs/export.md")
    repository = HOOKS["REPOSITORY"]
    address = f"[a script]({repository}/blob/main/examples/classify_onnx.py)"
    assert outside == (address if repository else "a script")


def test_what_a_page_would_load_from_elsewhere_is_found():
    found = HOOKS["LOADED"].findall(
        '<script src="https://cdn.org/a.js"></script><img src="a.png"><a href="https://x.org">'
        '<link rel="stylesheet" href="//fonts.org/a.css"><link rel="canonical" href="https://x.org">'
    )
    assert len(found) == 2


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


def test_the_public_modules_are_those_of_the_reference():
    modules = {path.split(".")[1] for path in paths_of_reference() if path.count(".") > 1}
    assert set(clip_prompt_peft.PUBLIC_MODULES) <= modules
