"""What `train --calibrate` does: a temperature and scores for sets of classes, of validation images alone."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict

from ..evaluation.calibration import TemperatureFit, fit_temperature
from ..evaluation.comparison import Answers
from ..evaluation.conformal import ConformalClassifier
from ..evaluation.tables import counted
from ..tuner import ClassifierAdapterConfig


def images_to_calibrate(is_asked: bool, splits: DatasetDict, test_sets: dict[str, Dataset]) -> Dataset | None:
    """Returns the validation images, all of them, if `--calibrate` is given.

    Raises:
        ValueError: If there are none besides those that are tested on.
    """
    if not is_asked:
        return None
    validation = splits.get("validation")
    if validation is None or "validation" in test_sets:
        are_tested = "they are what is tested on" if validation is not None else "there are none"
        raise ValueError(
            f"--calibrate needs validation images besides the training and the test images, and {are_tested}. Give "
            "them (--validation_dir beside --test_dir, or --validation_file beside --test_file), or leave --calibrate "
            "out."
        )
    if len(validation) < 2:
        raise ValueError(f"--calibrate needs at least two validation images, and there is {len(validation)}.")
    return validation


def check_has_place(config) -> None:
    """Raises `ValueError` if an adapter of a configuration is saved without its calibration."""
    if not isinstance(config, ClassifierAdapterConfig):
        raise ValueError(
            f"--calibrate is saved with adapters of this package, and this --method trains {config.peft_type.value} "
            "of peft, which has no place for it. Merge such an adapter and call fit_temperature on the classifier "
            "instead, or choose another --method."
        )


def calibrate(model, answers: Answers, seed: int, is_shown: bool) -> TemperatureFit:
    """Fits the temperature on one half of the validation images, and the scores on the other half.

    Args:
        model (`PeftModelForPromptClassification`):
            The trained model.
        answers (`Answers`):
            Its answers to the validation images.
        seed (`int`):
            The seed of the draw of the halves.
        is_shown (`bool`):
            Whether to print what comes out.
    """
    order = np.random.default_rng(seed).permutation(len(answers.labels))
    for_temperature, for_scores = np.array_split(order, 2)
    fit = fit_temperature(model, logits=answers.logits[for_temperature], labels=answers.labels[for_temperature])
    logits = answers.logits[for_scores] / fit.temperature
    scores = ConformalClassifier.fit(model, logits=logits, labels=answers.labels[for_scores]).scores
    if is_shown:
        print(
            f"Temperature {fit.temperature:.3g}, of {counted(fit.num_images, 'validation image')}: calibration error "
            f"{fit.ece_before:.1%} -> {fit.ece_after:.1%}"
        )
        highest = scores.num_images / (scores.num_images + 1)
        print(f"Sets of classes, of {counted(scores.num_images, 'other image')}: coverage up to {highest:.1%}")
    return fit
