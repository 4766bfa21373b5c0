"""A whole few-shot tuning on the embedded pictures: the image tower in every step, or embeddings computed once.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --epochs 20 --style noto

The recipe is that of the command `train`: the embedded tiny CLIP, 16 pictures of each of 12 classes, the stock
Trainer. The wall time is split into what it was spent on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager

import datasets
import torch
from common import print_table, synchronize
from peft import get_peft_model
from transformers import AutoImageProcessor, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import cache_image_embeds, class_names_of, sample_few_shot, with_pixel_values
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.metrics import compute_metrics


PARTS = ["image tower", "prompts: forward, backward", "data loading", "Trainer and optimizer", "all"]
# whether image embeddings are computed once, and the path of the class encoder
WAYS = {
    "as CoOp: images in every step, prompts of 77 tokens": (False, "plain"),
    "images in every step, packed prompts": (False, "auto"),
    "image embeddings computed once, packed prompts": (True, "auto"),
}


class Clock:
    """Seconds by what they were spent on; inner spans count for themselves only."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def span(self, name: str):
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        synchronize(self.device)  # what was launched on a card belongs to the span that launched it
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class ClockedTrainer(Trainer):
    """The Trainer, with a look at the clock where it takes a batch and where it runs the model."""

    clock: Clock

    def get_batch_samples(self, *args, **kwargs):
        with self.clock.span("data loading"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self.clock.span("prompts: forward, backward"):
            return super().training_step(*args, **kwargs)


def tune(cached: bool, path: str, style: str, epochs: int, cache_dir: str, device: str) -> tuple[Counter, float]:
    """Seconds by part, and the accuracy on the test pictures."""
    set_seed(1)
    splits = load_style(style)
    train, test = sample_few_shot(splits["train"], num_shots=16, seed=1, when_fewer="all"), splits["test"]
    image_processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(train))
    classifier.to(device)
    test_set = cache_image_embeds(test, classifier, image_processor)
    classifier.class_encoder.path = path
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    clock = Clock(device)
    time_calls(classifier, "get_image_features", clock)
    with clock.span("Trainer and optimizer"):
        if cached:
            with clock.span("data loading"):
                train_set = cache_image_embeds(train, model, image_processor)
        else:
            train_set = with_pixel_values(train, image_processor)
        args = TrainingArguments(
            cache_dir,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            use_cpu=device == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=1,
        )
        trainer = ClockedTrainer(model, args, train_dataset=train_set, compute_metrics=compute_metrics)
        trainer.clock = clock
        trainer.train()
    return clock.seconds, trainer.evaluate(test_set)["eval_accuracy"]


def time_calls(classifier, name: str, clock: Clock) -> None:
    function = getattr(classifier, name)

    def timed(*args, **kwargs):
        with clock.span("image tower"):
            return function(*args, **kwargs)

    setattr(classifier, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the card that the Trainer takes")
    parser.add_argument("--style", default=STYLES[0], choices=STYLES)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.disable_caching()  # every run computes its embeddings
    rows, totals = [], []
    for way, (cached, path) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, accuracy = tune(cached, path, args.style, args.epochs, folder, args.device)
        seconds["all"] = sum(seconds.values())
        totals.append(seconds["all"])
        rows.append([way, *(f"{seconds[part]:.2f}" for part in PARTS), f"{accuracy:.1%}"])
    title = f"{args.style}, {args.epochs} epochs, {args.device}, {torch.get_num_threads()} thread(s), seconds"
    print_table(title, ["", *PARTS, "accuracy"], rows)
    print("\nThe last is " + " and ".join(f"{total / totals[-1]:.1f}" for total in totals[:-1]) + " times faster.")


if __name__ == "__main__":
    main()
