"""Importing the package stays light."""

import subprocess
import sys


def test_importing_loads_nothing_that_only_data_metrics_plots_or_reports_need():
    script = (
        "import sys, clip_prompt_peft; print([m for m in ('evaluate', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
