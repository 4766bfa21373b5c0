"""Completion by Tab, which argcomplete asks the program for."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


pytest.importorskip("argcomplete")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("clip-prompt be", {"benchmark "}),
        ("clip-prompt train --test_", {"--test_dir", "--test_list", "--test_file"}),
        ("clip-prompt train --weight_d", {"--weight_decay "}),  # of the Trainer
        ("clip-prompt train --when_fewer ", {"error", "all", "repeat"}),
        ("clip-prompt predict outputs/pets --top", {"--top_k "}),
    ],
)
def test_words_go_on(line, words, tmp_path):
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "words")
    script = "import sys; from clip_prompt_cli.main import main; main()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **asked}, timeout=60)
    assert set((tmp_path / "words").read_text().split("\n")) - {"--help", "-h"} == words
