"""Tests of the examples, which are short scripts to copy, each in one file."""

import re

import pytest
from conftest import EXAMPLES
from safetensors.torch import load_file


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short_and_alone(script):
    source = (EXAMPLES / script).read_text()
    assert source.count("\n") <= 120
    for other in EXAMPLES.glob("*.py"):
        assert not re.search(rf"^(import|from) {other.stem}\b", source, flags=re.MULTILINE)


@pytest.mark.slow
def test_without_arguments_three_seeds_give_the_table_of_the_readme(run_here, tmp_path):
    printed = run_here("run_prompt_tuning.py")
    zero_shot, accuracy, deviation, zero_shot_mean, class_mean, _ = map(
        float, re.search(r"^fluenthc +(.+)$", printed, flags=re.MULTILINE).group(1).replace("±", "").split()
    )
    assert (zero_shot, zero_shot_mean) == (22.5, 23.4)
    assert (accuracy, class_mean) == (pytest.approx(38, abs=1.5), pytest.approx(45, abs=1.5))
    assert deviation < 3
    for seed in (1, 2, 3):
        (vectors,) = load_file(tmp_path / f"outputs/run_prompt_tuning/seed{seed}/adapter_model.safetensors").values()
        assert vectors.shape == (4, 128)


@pytest.mark.parametrize("argument", ["--train_dir", "--test_dir"])
def test_training_and_test_images_go_together(run_here, capsys, argument):
    with pytest.raises(SystemExit):
        run_here("run_prompt_tuning.py", argument, "somewhere")
    assert "--train_dir and --test_dir go together" in capsys.readouterr().err
