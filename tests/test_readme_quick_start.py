"""README's quick start runs word for word, and its result is the one that README shows."""

import re
from pathlib import Path

import pytest

from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data.known_datasets import load_style


README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_quick_start_prints_what_readme_shows(tmp_path, monkeypatch, capsys):
    section = README.read_text(encoding="utf-8").partition("## Quick start")[2].partition("\n## ")[0]
    snippet, shown = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", section, re.DOTALL).groups()
    assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 15
    monkeypatch.chdir(tmp_path)
    for split, icons in load_style("noto").items():
        for number, icon in enumerate(icons):
            folder = Path("photos", split, icons.features["label"].names[icon["label"]])
            folder.mkdir(parents=True, exist_ok=True)
            icon["image"].convert("RGB").save(folder / f"{number:03}.png")

    exec(snippet.replace("openai/clip-vit-base-patch16", str(TINY_CLIP)), {})

    printed = re.search(r"^([\d.]+)% -> ([\d.]+)% (\w+)$", capsys.readouterr().out, re.MULTILINE)
    before, after = map(float, printed.group(1, 2))
    shown_before, shown_after = map(float, re.findall(r"([\d.]+)%", shown))
    assert before == shown_before and after > before + 2
    assert abs(after - shown_after) < 2  # the last digits depend on the machine
    assert printed.group(3) == shown.split()[-1]
    assert Path("pets-prompts", "adapter_config.json").exists()
