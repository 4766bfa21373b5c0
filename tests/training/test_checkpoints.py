"""Tests with incomplete and damaged checkpoints of the Trainer."""

import shutil
from pathlib import Path

import pytest
import torch
from adapters import tuned
from transformers import Trainer, TrainingArguments

from clip_prompt_peft.training.checkpoints import checkpoint_damage, checkpoints_in, last_whole_checkpoint


@pytest.fixture
def trained(classifier, pixel_values, tmp_path):
    """An output folder with the checkpoints of three steps."""
    data = [{"pixel_values": image, "labels": index} for index, image in enumerate(pixel_values)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(tuned(classifier), args, train_dataset=data).train()
    return tmp_path


def files_of(checkpoint):
    needed = ("trainer_state", "adapter_config", "adapter_model", "optimizer", "scheduler", "rng_state")
    return sorted(file for file in Path(checkpoint).iterdir() if file.stem in needed)


def test_the_last_complete_checkpoint_is_returned(trained):
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-3")
    (trained / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-2")


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "runs", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert [Path(path).name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "nowhere") is None


def test_missing_truncated_and_modified_files_are_noticed(trained, tmp_path_factory):
    whole = trained / "checkpoint-3"
    assert len(files_of(whole)) == 6 and checkpoint_damage(whole) is None
    for name in [file.name for file in files_of(whole)]:
        copy = tmp_path_factory.mktemp("damaged") / "checkpoint-3"
        content = (whole / name).read_bytes()
        for damaged in (None, b"", content[: len(content) // 2], content[:-1].rstrip(b"}\n"), bytes(len(content))):
            shutil.copytree(whole, copy, dirs_exist_ok=True)
            (copy / name).unlink()
            if damaged is not None:
                (copy / name).write_bytes(damaged)
            damage = checkpoint_damage(copy)
            assert damage is not None and damage.startswith(name.partition(".")[0]), (name, damage)


@pytest.mark.slow
def test_files_truncated_anywhere_are_noticed(trained):
    generator = torch.Generator().manual_seed(0)
    for file in files_of(trained / "checkpoint-3"):
        content = file.read_bytes()
        for length in torch.randint(len(content.rstrip()), (40,), generator=generator).tolist():
            file.write_bytes(content[:length])
            assert last_whole_checkpoint(trained) == str(trained / "checkpoint-2"), (file.name, length)
        file.write_bytes(content)
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-3")


def test_a_checkpoint_of_the_model_alone_is_complete(trained):
    for file in files_of(trained / "checkpoint-3"):
        if file.stem in ("optimizer", "scheduler", "rng_state"):
            file.unlink()
    assert checkpoint_damage(trained / "checkpoint-3") is None


def test_a_skipped_checkpoint_is_reported(trained, caplog):
    (trained / "checkpoint-3" / "optimizer.pt").unlink()
    last_whole_checkpoint(trained)
    assert "checkpoint-3 is passed over, since it is not whole: optimizer.pt is missing" in caplog.text
