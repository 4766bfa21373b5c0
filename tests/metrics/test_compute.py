from pathlib import Path

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from transformers import EvalPrediction

import clip_prompt_peft.metrics
from clip_prompt_peft.metrics import Accuracy, MeanClassAccuracy, compute_metrics


FOLDER = Path(clip_prompt_peft.metrics.__file__).parent


def test_accuracy_counts_images_and_mean_class_accuracy_counts_classes():
    # class 0: 3 of 4 correct, class 1: 0 of 1, class 3: 1 of 1; class 2 has no images
    answers = {"predictions": [0, 0, 0, 3, 2, 3], "references": [0, 0, 0, 0, 1, 3]}
    assert Accuracy().compute(**answers)["accuracy"] == pytest.approx(4 / 6)
    assert MeanClassAccuracy().compute(**answers)["mean_class_accuracy"] == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_the_largest_logit_is_the_prediction():
    logits = np.array([[0.1, 2.0, -1.0], [3.0, -5.0, 0.0], [0.0, 0.0, 1.0]])
    metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0])))
    assert metrics == {"accuracy": pytest.approx(2 / 3), "mean_class_accuracy": pytest.approx((1 + 1 / 2) / 2)}


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    references, predictions = rng.integers(0, 7, size=(2, 200))
    answers = {"predictions": predictions, "references": references}
    assert Accuracy().compute(**answers)["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(references, predictions)
    )
    assert MeanClassAccuracy().compute(**answers)["mean_class_accuracy"] == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(references, predictions)
    )


@pytest.mark.parametrize("name", ["accuracy", "mean_class_accuracy"])
def test_evaluate_loads_a_metric_by_its_file(name, tmp_path):
    metric = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {name: 1.0}
