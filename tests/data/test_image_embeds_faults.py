"""Tests of the cache of image embeddings with processes that are killed or write at the same time."""

import os
import shutil
import signal

import pytest
import torch
from conftest import EMOJI, TINY_CLIP
from transformers import AutoImageProcessor

from clip_prompt_peft.data import cache_image_embeds, load_image_dataset


@pytest.fixture
def embed(classifier, tmp_path):
    """A function that embeds images of a dataset with its own cache folder."""
    files = {"train": str(EMOJI / "noto-train.parquet")}
    dataset = load_image_dataset(files=files, cache_dir=str(tmp_path))["train"].select(range(24))
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    return lambda: cache_image_embeds(dataset, classifier, image_processor, batch_size=4)[:]["image_embeds"]


@pytest.fixture
def expected(classifier):
    """The embeddings computed without a cache."""
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-train.parquet")})["train"].select(range(24))
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    pixel_values = image_processor([image.convert("RGB") for image in dataset["image"]], return_tensors="pt")
    with torch.no_grad():
        return classifier.get_image_features(**pixel_values).pooler_output


def in_another_process(action):
    """Runs an action in a forked process and returns the process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if action() else 2
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_write_at_the_same_time_all_get_correct_embeddings(embed, expected):
    def is_right():
        return torch.allclose(embed(), expected, atol=1e-5)

    assert [exit_code(pid) for pid in [in_another_process(is_right) for _ in range(3)]] == [0, 0, 0]
    assert is_right()


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
def test_a_process_killed_between_two_batches_leaves_no_file_that_is_read(embed, expected, classifier, batch):
    def embed_and_die():
        batches, compute = [], classifier.get_image_features

        def count(**inputs):
            if len(batches) == batch:
                die()
            batches.append(inputs)
            return compute(**inputs)

        classifier.get_image_features = count
        embed()

    assert exit_code(in_another_process(embed_and_die)) == -signal.SIGKILL
    torch.testing.assert_close(embed(), expected)


def test_a_process_killed_before_it_moves_its_file_leaves_no_file_that_is_read(embed, expected, monkeypatch):
    def embed_and_die():
        monkeypatch.setattr(shutil, "move", die)
        embed()

    assert exit_code(in_another_process(embed_and_die)) == -signal.SIGKILL
    torch.testing.assert_close(embed(), expected)


def test_a_process_with_other_weights_does_not_get_embeddings_of_the_first(embed, expected, classifier):
    def change_and_embed():
        with torch.no_grad():
            classifier.visual_projection.weight.mul_(2)
        return torch.allclose(embed(), 2 * expected, atol=1e-5)

    pids = [in_another_process(action) for action in (change_and_embed, lambda: torch.allclose(embed(), expected))]
    assert [exit_code(pid) for pid in pids] == [0, 0]
    torch.testing.assert_close(embed(), expected)
