"""What adaptation at test time changes on the embedded pictures: accuracy and calibration in three styles.

    python benchmarks/test_time_styles.py
    python benchmarks/test_time_styles.py --seeds 1 --images 20  # for a try

The prompt is tuned on 16 pictures of each of 12 classes in one style, with the default recipe. The other styles are
shifted domains. A seed draws the pictures, orders them, and draws the views and the order of the stream. All methods
see the same views, embedded once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict

import torch
from common import print_table
from datasets import disable_progress_bars
from peft import get_peft_model
from transformers import AutoImageProcessor, EvalPrediction, TrainingArguments, set_seed
from transformers.utils import logging

from clip_prompt_peft import (
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    DynamicAdapter,
    TestTimeTuner,
    training_recipe,
)
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import RandomViews, cache_image_embeds, class_names_of, sample_few_shot
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.metrics import compute_metrics


METRICS = {"accuracy": "accuracy", "expected_calibration_error": "calibration error"}
WAYS = {
    "none": None,
    "`tpt`": {"objective": "tpt"},
    "`c-tpt`": {"objective": "c-tpt"},
    "`c-tpt`, weight 20": {"objective": "c-tpt", "dispersion_weight": 20.0},
    "`r-tpt`": {"objective": "r-tpt"},
    "`tda`": DynamicAdapter,
    "`tda`, 64 views": DynamicAdapter,
}


def tuned(classifier, processor, pictures, seed: int, epochs: float | None):
    """The classifier with a prompt that is tuned on pictures of one style."""
    set_seed(seed)
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    train = cache_image_embeds(sample_few_shot(pictures, 16, seed=seed, when_fewer="all"), classifier, processor)
    overrides = {} if epochs is None else {"num_train_epochs": epochs}
    recipe = training_recipe("default", model, num_examples=len(train), shots=16, **overrides)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **recipe.arguments, seed=seed, report_to="none", disable_tqdm=True)
        recipe.trainer_class(
            model, arguments, train_dataset=train, optimizers=recipe.optimizers, callbacks=recipe.callbacks
        ).train()
    return model.eval()


def answers(model, image_embeds: torch.Tensor, way: str) -> torch.Tensor:
    """The logits (N, C) for the embeddings (N, V, E) of the views of all pictures."""
    settings = WAYS[way]
    if settings is None:
        with torch.no_grad():
            return model(image_embeds=image_embeds[:, 0]).logits
    if settings is DynamicAdapter:
        return DynamicAdapter.of(model)(image_embeds if "views" in way else image_embeds[:, 0]).logits
    return TestTimeTuner(model, **settings)(image_embeds=image_embeds).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--style", default=STYLES[0], choices=STYLES, help="what the prompt is tuned on")
    parser.add_argument("--images", type=int, help="test pictures of each style, by default all")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--epochs", type=float, help="of the tuning, by default the recipe's")
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    styles = {style: load_style(style) for style in STYLES}
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    results = defaultdict(list)
    for seed in args.seeds:
        names = class_names_of(styles[args.style]["train"])
        zero_shot = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names).eval()
        other = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names).eval()
        models = {
            "zero-shot": zero_shot,
            "tuned": tuned(other, processor, styles[args.style]["train"], seed, args.epochs),
        }
        views = RandomViews(processor, args.views, generator=torch.Generator().manual_seed(seed))
        for style, splits in styles.items():
            pictures = splits["test"].shuffle(seed)
            pictures = pictures.select(range(min(args.images or len(pictures), len(pictures))))
            tuner = TestTimeTuner(zero_shot, views=views)
            embeds = torch.cat([tuner.embed_views(picture["image"]) for picture in pictures])
            labels = torch.tensor(pictures["label"]).numpy()
            for name, model in models.items():
                for way in WAYS:
                    logits = answers(model, embeds, way).numpy()
                    found = compute_metrics(EvalPrediction(logits, labels))
                    for metric in METRICS:
                        results[metric, name, way, style].append(100 * found[metric])
    for metric, title in METRICS.items():
        rows = [
            [name, way, *(described(results[metric, name, way, style]) for style in STYLES)]
            for name in models
            for way in WAYS
        ]
        print_table(
            f"{title} in percent, mean and standard deviation of {len(args.seeds)} seeds; tuned on {args.style}",
            ["prompt", "at test time", *STYLES],
            rows,
        )


def described(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
