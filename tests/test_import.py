"""Importing the package stays light."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_importing_loads_nothing_that_only_data_metrics_plots_or_reports_need():
    # transformers 5.18 itself, and so peft, load sklearn where it is installed
    script = (
        "import sys, peft; before = set(sys.modules); import clip_prompt_peft; "
        "print([m for m in ('evaluate', 'matplotlib', 'sklearn') if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
