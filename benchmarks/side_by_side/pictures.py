"""The same pictures, class names and settings for all three; not counted."""

import os

from datasets import Dataset

from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.common import use_one_thread_if_tiny
from clip_prompt_peft.data import class_names_of, sample_few_shot
from clip_prompt_peft.data.known_datasets import load_style


EPOCHS = int(os.environ.get("EPOCHS", "50"))
DEVICE = os.environ.get("DEVICE", "cpu")
BATCH_SIZE, LEARNING_RATE, SEED = 32, 2e-3, 1
TEMPLATE = "a photo of a {}."


def load() -> tuple[Dataset, Dataset, list[str]]:
    """16 training pictures a class, the test pictures (columns `image` and `label`), and the class names."""
    use_one_thread_if_tiny(TINY_CLIP)
    splits = load_style("fluenthc")
    train = sample_few_shot(splits["train"], num_shots=16, seed=SEED, when_fewer="all")
    return train, splits["test"], class_names_of(train)
