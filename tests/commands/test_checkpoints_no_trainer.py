"""Tests of the example with a training loop of its own: what it prints, and its checkpoints."""

import os
import re

import pytest
import torch
from adapters import vectors_in


SCRIPT = "run_prompt_tuning_no_trainer.py"
SMALL = ["--shots", 2, "--num_train_epochs", 3, "--checkpointing_steps", "epoch", "--output_dir"]


def test_an_interrupted_training_ends_with_the_same_vectors(run_here, tmp_path):
    run_here(SCRIPT, *SMALL, "whole")
    (tmp_path / "part/epoch_2.part").mkdir(parents=True)  # broke off while it was written
    os.rename(tmp_path / "whole/epoch_1", tmp_path / "part/epoch_1")
    run_here(SCRIPT, *SMALL, "part", "--resume_from_checkpoint", "true")
    assert torch.equal(vectors_in(tmp_path / "part"), vectors_in(tmp_path / "whole"))
    assert not torch.equal(vectors_in(tmp_path / "part/epoch_1"), vectors_in(tmp_path / "part/epoch_3"))
    size = sum(file.stat().st_size for file in (tmp_path / "part/epoch_3").iterdir())
    assert size < 100_000  # the frozen model is not in it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "'out/epoch_1' is left of an earlier run"), (["--resume_from_checkpoint", "gone"], "'gone' is no folder")],
)
def test_checkpoints_are_not_mixed_up(run_here, tmp_path, arguments, said):
    (tmp_path / "out/epoch_1").mkdir(parents=True)
    with pytest.raises(SystemExit, match=said):
        run_here(SCRIPT, *SMALL, "out", *arguments)


def test_a_loss_that_is_no_number_ends_the_training_without_saving(run_here, tmp_path):
    with pytest.raises(SystemExit, match=r"loss of epoch \d is (nan|inf).* Try a lower --learning_rate"):
        run_here(SCRIPT, *SMALL, "out", "--learning_rate", "1e30")
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_loop_with_accelerate_tunes_like_the_trainer(run_here, tmp_path):
    printed = run_here(SCRIPT, "--num_train_epochs", 12)
    row = re.search(r"^test +(\d.+)$", printed, flags=re.MULTILINE).group(1).split()
    zero_shot, accuracy, _, class_mean = map(float, row)
    assert zero_shot == pytest.approx(22.5, abs=0.05)  # as the other example prints
    assert accuracy > zero_shot + 5
    assert class_mean > zero_shot + 5
    assert (tmp_path / "outputs/prompt_tuning_no_trainer/adapter_model.safetensors").exists()


def test_a_mistake_is_told_in_one_line_before_any_work(run_here, tmp_path):
    with pytest.raises(SystemExit, match=f"{SCRIPT}: error: The image folder 'gone' does not exist"):
        run_here(SCRIPT, "--train_dir", "gone")
    assert not (tmp_path / "outputs").exists()
