"""Images with several labels."""

import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.metrics import compute_multi_label_metrics
from clip_prompt_peft.tuner.base_config import MULTI_LABEL


LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.fixture
def multi_label():
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES, problem_type=MULTI_LABEL)


@torch.no_grad()
def test_the_logits_are_the_same_and_the_loss_is_binary_cross_entropy(multi_label, classifier, pixel_values):
    out = multi_label.eval()(pixel_values=pixel_values, labels=LABELS)
    torch.testing.assert_close(out.logits, classifier(pixel_values=pixel_values).logits)
    probabilities = out.logits.double().sigmoid()
    expected = -torch.where(LABELS > 0, probabilities.log(), (1 - probabilities).log()).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_problem_type_is_saved(multi_label, pixel_values, tmp_path):
    multi_label.save_pretrained(tmp_path)
    again = CLIPForPromptClassification.from_pretrained(tmp_path).eval()
    assert (
        again(pixel_values=pixel_values, labels=LABELS).loss
        == multi_label.eval()(pixel_values=pixel_values, labels=LABELS).loss
    )


@pytest.mark.parametrize(
    "load", [AutoPeftModelForPromptClassification.from_pretrained, CLIPForPromptClassification.from_pretrained]
)
def test_the_problem_type_is_shared_with_the_adapter(multi_label, load, tmp_path):
    get_peft_model(multi_label, CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    assert load(tmp_path).config.problem_type == MULTI_LABEL


def test_an_unknown_problem_type_is_refused():
    with pytest.raises(ValueError, match=r"problem_type must be None or one of \('single_label_classification'"):
        CLIPPromptTuningConfig(problem_type="regression")


class Images(Dataset):
    def __init__(self, pixel_values):
        self.pixel_values = pixel_values

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": LABELS[index].float()}


def test_the_trainer_trains_and_evaluates_it(multi_label, pixel_values, tmp_path):
    dataset = Images(pixel_values)
    arguments = TrainingArguments(tmp_path, num_train_epochs=10, learning_rate=0.02, report_to="none", use_cpu=True)
    model = get_peft_model(multi_label, CLIPPromptTuningConfig())
    trainer = Trainer(model, arguments, train_dataset=dataset, compute_metrics=compute_multi_label_metrics)
    before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    metrics = trainer.evaluate(dataset)
    assert metrics["eval_loss"] < before
    assert 0 < metrics["eval_mean_average_precision"] <= 1


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2]), torch.zeros(3, 5)])
def test_labels_of_another_shape_are_told(multi_label, pixel_values, labels):
    with pytest.raises(ValueError, match=r"\(B, 4\) zeros and ones, one for each class \(animal, plant"):
        multi_label(pixel_values=pixel_values, labels=labels)
