"""Importing the package stays light."""

import subprocess
import sys

import pytest

import clip_prompt_peft


@pytest.mark.slow
def test_importing_loads_nothing_that_only_data_metrics_plots_or_reports_need():
    # transformers 5.18 itself, and so peft, load sklearn where it is installed
    script = (
        "import sys, peft; before = set(sys.modules); import clip_prompt_peft; "
        "print([m for m in ('evaluate', 'matplotlib', 'sklearn') if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_public_modules_are_there_after_importing_the_package():
    script = (
        "import clip_prompt_peft as package; "
        "print(package.data.load_image_dataset.__name__, package.export.export_classifier.__name__); "
        "print([name for name in dir(package) if name.islower() and not name.startswith('__')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    names, listed = done.stdout.splitlines()
    assert names == "load_image_dataset export_classifier", done.stderr
    assert "'data'" in listed and "modeling" not in listed and "import_module" not in listed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'clip_prompt_peft' has no attribute 'dada'"):
        clip_prompt_peft.dada  # noqa: B018
    assert all(hasattr(clip_prompt_peft, name) for name in dir(clip_prompt_peft))
