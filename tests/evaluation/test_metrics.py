"""Metrics, compared with scikit-learn and with values computed by hand."""

import numpy as np
import pytest
import sklearn.metrics
from sklearn.calibration import calibration_curve
from transformers import EvalPrediction

from clip_prompt_peft.evaluation.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    MacroF1,
    MeanAveragePrecision,
    MeanClassAccuracy,
    TopKAccuracy,
    compute_metrics,
    compute_multi_label_metrics,
    harmonic_mean,
    softmax,
)


def test_accuracy_counts_images_and_mean_class_accuracy_counts_classes():
    # class 0: 3 of 4 correct, class 1: 0 of 1, class 3: 1 of 1; class 2 has no images
    answers = {"predictions": [0, 0, 0, 3, 2, 3], "references": [0, 0, 0, 0, 1, 3]}
    assert Accuracy().compute(**answers)["accuracy"] == pytest.approx(4 / 6)
    assert MeanClassAccuracy().compute(**answers)["mean_class_accuracy"] == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_the_largest_logit_is_the_prediction():
    logits = np.array([[0.1, 2.0, -1.0], [3.0, -5.0, 0.0], [0.0, 0.0, 1.0]])
    metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0])))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["mean_class_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)  # class 0: precision 1, recall 1/2
    assert "top5_accuracy" not in metrics  # of three classes, five are always right


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
    assert MacroF1().compute(**answers)["macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(references, predictions, average="macro")
    )


@pytest.mark.parametrize("seed", range(3))
def test_values_of_scores_equal_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    references, logits = rng.integers(0, 7, size=200), rng.normal(size=(200, 7))
    for k in (2, 5):
        value = TopKAccuracy().compute(predictions=logits, references=references, k=k)[f"top{k}_accuracy"]
        assert value == pytest.approx(sklearn.metrics.top_k_accuracy_score(references, logits, k=k))
    probabilities = softmax(logits)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == references
    accuracies, confidences = calibration_curve(is_correct, confidence, n_bins=15)
    counts, _ = np.histogram(confidence, bins=15, range=(0, 1))
    expected = np.average(np.abs(accuracies - confidences), weights=counts[counts > 0])
    value = ExpectedCalibrationError().compute(predictions=probabilities, references=references)
    assert value["expected_calibration_error"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_that_of_scikit_learn_also_with_equal_scores(seed):
    rng = np.random.default_rng(seed)
    references, scores = rng.integers(0, 2, size=(50, 6)), rng.integers(0, 8, size=(50, 6)) / 8
    value = MeanAveragePrecision().compute(predictions=scores, references=references)["mean_average_precision"]
    assert value == pytest.approx(sklearn.metrics.average_precision_score(references, scores, average="macro"))
    assert compute_multi_label_metrics(EvalPrediction(scores, references)) == {"mean_average_precision": value}


def test_a_class_without_images_does_not_count():
    answers = {"predictions": [0, 2, 1], "references": [0, 0, 1]}
    assert MacroF1().compute(**answers)["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    scores, references = [[0.9, 0.3], [0.1, 0.2]], [[1, 0], [0, 0]]
    assert MeanAveragePrecision().compute(predictions=scores, references=references)["mean_average_precision"] == 1


def test_all_metrics_of_many_classes_are_computed_at_once():
    logits = np.eye(7)
    metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 2, 3, 4, 5, 0])))
    assert metrics["accuracy"] == pytest.approx(6 / 7)
    assert metrics["top5_accuracy"] == 1  # of six equal scores, the first four count
    confidence = np.e / (np.e + 6)
    assert metrics["expected_calibration_error"] == pytest.approx(6 / 7 - confidence)


def test_calibration_of_logits_is_refused():
    with pytest.raises(ValueError, match="softmax"):
        ExpectedCalibrationError().compute(predictions=[[3.0, -1.0]], references=[0])


def test_the_harmonic_mean_is_that_of_the_literature():
    assert harmonic_mean(82.69, 63.22) == pytest.approx(71.66, abs=0.005)  # CoOp's average over 11 data sets
    assert harmonic_mean(0.0, 0.0) == 0
    with pytest.raises(ValueError, match="-1"):
        harmonic_mean(0.5, -1)


@pytest.mark.parametrize(
    ("metric", "name"), [(Accuracy, "accuracy"), (MeanClassAccuracy, "mean_class_accuracy"), (MacroF1, "macro_f1")]
)
def test_predictions_can_be_added_in_batches(metric, name, tmp_path):
    metric = metric(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {name: 1.0}


def test_images_that_the_loss_ignores_are_left_out_and_the_first_of_several_outputs_counts():
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [5.0, 0.0]]), np.array([0, 0, -100])
    expected = compute_metrics(EvalPrediction(predictions=logits[:2], label_ids=labels[:2]))
    assert expected["accuracy"] == 0.5
    for predictions in (logits, (logits, np.zeros((3, 7))), [(logits, np.zeros((3, 7)))]):
        given = labels if not isinstance(predictions, list) else [labels]
        assert compute_metrics(EvalPrediction(predictions=predictions, label_ids=given)) == expected


def test_predictions_without_a_meaning_are_refused():
    logits, labels = np.array([[0.0, 1.0], [np.nan, 1.0]]), np.array([0, 1])
    with pytest.raises(ValueError, match="1 of 2 images have NaN, such as those of image 1"):
        compute_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    with pytest.raises(ValueError, match="1 of 2 images have NaN"):
        compute_multi_label_metrics(EvalPrediction(predictions=logits, label_ids=np.eye(2)))
    with pytest.raises(ValueError, match="None of the 2 images has a label"):
        compute_metrics(EvalPrediction(predictions=np.eye(2), label_ids=np.array([-100, -100])))
    with pytest.raises(ValueError, match=r"got predictions of shape \(2, 2\) and label_ids of shape \(3,\)"):
        compute_metrics(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1, 1])))
