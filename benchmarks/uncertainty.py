"""Calibration error with and without a temperature, and sets of classes, on the embedded pictures of three styles.

    python benchmarks/uncertainty.py                       # zero-shot, the default prompts and coop, three seeds

Prompts are tuned on 16 pictures of each class of one style. Of its test pictures, a random quarter is for the
temperature and a quarter for the scores of the sets; all else is measured on the other half, and on the test pictures
of the other two styles, which nothing was fitted on.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import print_table
from peft import get_peft_model
from transformers import AutoImageProcessor, PrinterCallback, TrainingArguments, set_seed

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, method_config, training_recipe
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import cache_image_embeds, class_names_of, sample_few_shot
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.calibration import fit_temperature
from clip_prompt_peft.evaluation.comparison import ECE, Answers
from clip_prompt_peft.evaluation.conformal import ConformalClassifier
from clip_prompt_peft.evaluation.metrics import calibration_error, softmax


WAYS = (("lac", False), ("aps", False), ("aps", True))


def tune(classifier, method: str, train, seed: int, epochs: float | None):
    """Returns the classifier with a trained adapter, or as it is for zero-shot."""
    if method == "zero-shot":
        return classifier
    set_seed(seed)
    config = CLIPPromptTuningConfig() if method == "default" else method_config(method, classifier)
    model = get_peft_model(classifier, config)
    given = {} if epochs is None else {"num_train_epochs": epochs}
    recipe = training_recipe(method, model, len(train), shots=16, use_cpu=True, **given)
    with TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args = TrainingArguments(folder, seed=seed, **quiet, **recipe.arguments)
        trainer = recipe.trainer_class(
            model, args, train_dataset=train, optimizers=recipe.optimizers, callbacks=recipe.callbacks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


@torch.no_grad()
def answers_of(model, dataset) -> Answers:
    rows = dataset[:]
    return Answers(model(image_embeds=rows["image_embeds"]).logits.numpy(), rows["labels"].numpy())


def error_if_right(answers: Answers, num_draws: int = 200) -> float:
    """Returns the mean error if the probabilities were exactly right: labels are drawn from them."""
    probabilities, random = softmax(answers.logits.astype(np.float64)), np.random.default_rng(0)
    errors = []
    for _ in range(num_draws):
        labels = (probabilities.cumsum(axis=1) < random.random((len(probabilities), 1))).sum(axis=1)
        errors.append(calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels))
    return float(np.mean(errors))


def measure(model, parts: dict, others: dict) -> dict[tuple, list[float]]:
    """Returns the numbers of a seed by what they are: style, way and quantity."""
    tests = {"same style": parts["test"], **others}
    before = {name: answers_of(model, dataset) for name, dataset in tests.items()}
    fit = fit_temperature(model, parts["temperature"])
    found: dict[tuple, float] = {("temperature",): fit.temperature}
    for name, dataset in tests.items():
        answers = answers_of(model, dataset)
        found |= {
            (name, "accuracy"): answers.metrics["accuracy"],
            (name, "before"): before[name].metrics[ECE],
            (name, "after"): answers.metrics[ECE],
            (name, "floor"): error_if_right(answers),
        }
    for method, randomized in WAYS:
        conformal = ConformalClassifier.fit(model, parts["scores"], method=method, randomized=randomized)
        for name, dataset in tests.items():
            _, (_, share, size, empty), _ = conformal.evaluate(dataset)  # of the coverage 0.9
            found |= {
                (name, method, randomized, "share"): share,
                (name, method, randomized, "size"): size,
                (name, method, randomized, "empty"): empty,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="style to tune and to calibrate on")
    parser.add_argument(
        "--methods", nargs="+", default=["zero-shot", "default", "coop"], help="presets, default, zero-shot"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    styles = {style: load_style(style) for style in STYLES}
    base = CLIPForPromptClassification.from_pretrained(
        TINY_CLIP, class_names=class_names_of(styles[args.style]["train"])
    )
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    tests = {style: cache_image_embeds(of_style["test"], base, processor) for style, of_style in styles.items()}
    own = tests.pop(args.style)
    results: dict[str, list[dict]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        drawn = sample_few_shot(styles[args.style]["train"], 16, seed=seed, when_fewer="all")
        train = cache_image_embeds(drawn, base, processor)
        quarters = np.array_split(np.random.default_rng(seed).permutation(len(own)), 4)
        rows = {"temperature": quarters[0], "scores": quarters[1], "test": np.concatenate(quarters[2:])}
        parts = {name: own.select(indices) for name, indices in rows.items()}
        for method in args.methods:
            model = tune(base, method, train, seed, args.epochs)
            results[method].append(measure(model, parts, tests))
            if method != "zero-shot":
                model.unload()
            base.set_temperature(None)
            base.set_conformal_scores(None)
    show(results, list(tests))


def show(results: dict[str, list[dict]], others: list[str]) -> None:
    """Prints means and standard deviations over the seeds."""

    def cell(method: str, *key, factor: float = 100, digits: int = 1) -> str:
        values = factor * np.array([found[key] for found in results[method]])
        return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"

    pairs = [(method, place) for method in results for place in ("same style", *others)]
    errors = [
        [
            method,
            cell(method, "temperature", factor=1, digits=2),
            place,
            *(cell(method, place, name) for name in ("accuracy", "before", "after", "floor")),
        ]
        for method, place in pairs
    ]
    header = ["method", "temperature", "pictures", "accuracy", "error without", "with the temperature", "if right"]
    print_table("Calibration error (ECE, 15 bins), percent", header, errors)
    names = ["lac", "aps", "aps, randomized"]
    header = ["method", "pictures", *(f"{name}: {what}" for name in names for what in ("coverage", "size"))]
    sets = [
        [
            method,
            place,
            *(
                cell(method, place, *way, quantity, factor=factor)
                for way in WAYS
                for quantity, factor in (("share", 100), ("size", 1))
            ),
        ]
        for method, place in pairs
    ]
    print_table("Sets of classes for a coverage of 90 percent, of 12 classes", header, sets)
    empty = [
        max(found[key] for runs in results.values() for found in runs for key in found if key[1:] == (*way, "empty"))
        for way in WAYS
    ]
    print("\nEmpty sets, at most: " + ", ".join(f"{name} {share:.1%}" for name, share in zip(names, empty)))


if __name__ == "__main__":
    main()
