"""Tests of the training step of ProGrad."""

import functools

import pytest
import regularized_training
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPPromptTuningConfig, ProGradTrainer


# Training moves the virtual tokens by about 0.1. Without the projection, they end more than 1e-3 away.
NEAR = {"rtol": 0, "atol": 2e-5}


def vectors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory):
    def train(regularizer):
        folder = tmp_path_factory.mktemp(regularizer)
        regularized_training.train(regularizer, str(folder), batch_size=8, accumulation_steps=1)
        return vectors_in(folder)

    return functools.cache(train)


@pytest.mark.slow
def test_accumulated_gradients_are_projected_as_those_of_one_large_batch(whole_batches, tmp_path):
    regularized_training.train("prograd", str(tmp_path), batch_size=2, accumulation_steps=4)
    assert_close(vectors_in(tmp_path), whole_batches("prograd"), **NEAR)


def test_the_projection_makes_a_difference(whole_batches, tmp_path):
    class OnlyCrossEntropy(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs, return_loss_terms=True).loss

    regularized_training.train("prograd", str(tmp_path), 8, 1, trainer_class=OnlyCrossEntropy)
    expected = whole_batches("prograd")
    differences = {name: (value - expected[name]).abs().max() for name, value in vectors_in(tmp_path).items()}
    assert max(differences.values()) > 50 * NEAR["atol"]


@pytest.mark.slow
def test_classes_encoded_in_chunks_have_their_gradients_projected_too(whole_batches, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_prompt_peft.text.encoder.ClassEncoder._chunk_size", lambda self, *sizes: 1)
    regularized_training.train("prograd", str(tmp_path), batch_size=8, accumulation_steps=1)
    assert_close(vectors_in(tmp_path), whole_batches("prograd"), **NEAR)


def test_without_a_prograd_adapter_it_behaves_as_the_stock_trainer(classifier, tmp_path):
    class Record(ProGradTrainer):
        def compute_loss(self, *args, **kwargs):
            self.loss = super().compute_loss(*args, **kwargs)
            return self.loss

    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    args = TrainingArguments(tmp_path, max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    trainer = Record(model, args, train_dataset=regularized_training.examples())
    trainer.train()
    assert torch.isfinite(trainer.loss)


def test_label_smoothing_is_an_error(classifier, tmp_path):
    model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset("prograd"))
    options = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, **options)
    with pytest.raises(ValueError, match="the model's own cross entropy; leave out label_smoothing_factor"):
        ProGradTrainer(model, args, train_dataset=regularized_training.examples()).train()


def test_evaluation_is_the_one_of_the_stock_trainer(classifier, tmp_path):
    model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset("prograd"))
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    examples = regularized_training.examples()
    metrics = ProGradTrainer(model, args).evaluate(examples)
    batch = {key: torch.stack([torch.as_tensor(example[key]) for example in examples]) for key in examples[0]}
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-5)
