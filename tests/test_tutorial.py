"""The notebook of the docs runs from top to bottom, and shows what it printed when it was run last."""

import re

import pytest
from conftest import ROOT


NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def printed_by(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def accuracies(printed):
    return [float(number) for number in re.search(r"^([\d.]+)% -> ([\d.]+)%$", printed, re.MULTILINE).groups()]


@pytest.mark.slow  # a process that trains
def test_the_tutorial_runs_and_shows_what_it_printed(tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat
    from run_notebook import executed

    done = executed(NOTEBOOK, tmp_path)

    before, after = accuracies(printed_by(done))
    shown_before, shown_after = accuracies(printed_by(nbformat.read(NOTEBOOK, as_version=4)))
    assert before == shown_before and after > before + 2
    assert abs(after - shown_after) < 2  # the last digits depend on the machine
    shown = [output.get("data", {}) for cell in done.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) == 2  # images, and the confusion of classes
    assert (tmp_path / "icons-prompts" / "adapter_config.json").exists()
    assert NOTEBOOK.stat().st_size < 100_000
