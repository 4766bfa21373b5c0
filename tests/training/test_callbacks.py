"""Tests of Gaussian averaging of prompts over epochs."""

import json

import pytest
import torch
from conftest import TINY_CLIP
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, GaussianPromptAveraging
from clip_prompt_peft.training.callbacks import gaussian_weights


EPOCHS = 4


def test_weights_follow_the_normal_density_and_sum_to_one():
    weights = gaussian_weights(3, mean=2, std=1)
    side = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.stack([side, side * 0 + 1, side]) / (1 + 2 * side))


def test_the_weights_of_the_authors(golden):
    torch.testing.assert_close(gaussian_weights(5, 3, 1), golden("promptsrc_gpa_5epochs")["gpa_weights"])
    expected = golden("promptsrc_ctxinit")["gpa_weights_20_mean15_std1"]
    torch.testing.assert_close(gaussian_weights(20, 15, 1), expected)


def test_weights_far_from_the_mean_are_finite():
    weights = gaussian_weights(3, mean=200, std=1)
    assert weights.sum().item() == pytest.approx(1)
    assert weights.argmax() == 2


@pytest.mark.parametrize("std", [0, -1.0])
def test_a_std_that_is_not_positive_is_an_error(std):
    with pytest.raises(ValueError, match=f"std must be positive, got {std}"):
        GaussianPromptAveraging(3, std)


class Record(TrainerCallback):
    """Records the trainable parameters at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.epochs.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def train(folder, callbacks, resume=None, **arguments):
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "plant"])
    fields = {"num_vision_virtual_tokens": 2, "vision_prompts_from_text": True, "num_virtual_tokens": 2}
    model = get_peft_model(classifier, CLIPPromptTuningConfig(**fields))
    images = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    examples = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
    args = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    trainer = Trainer(model, args, train_dataset=examples, eval_dataset=examples, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def weighted_mean(epochs, weights):
    return {name: sum(w * epoch[name].double() for w, epoch in zip(weights, epochs)).float() for name in epochs[0]}


def test_trained_parameters_end_as_the_weighted_mean_over_epochs(tmp_path):
    record = Record()
    result = train(tmp_path, [record, GaussianPromptAveraging(3, 1)])
    expected = weighted_mean(record.epochs, gaussian_weights(EPOCHS, 3, 1))
    assert len(record.epochs) == EPOCHS and len(result) == 3  # virtual tokens, weight and bias of the projection
    torch.testing.assert_close(result, expected)
    assert any(not torch.equal(result[name], record.epochs[-1][name]) for name in result)


@pytest.mark.slow
@pytest.mark.parametrize("restore_by_trainer", [False, True])
def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path, restore_by_trainer):
    flag = {"restore_callback_states_from_checkpoint": restore_by_trainer}
    expected = train(tmp_path, [GaussianPromptAveraging(2, 2)], save_strategy="steps", save_steps=5, **flag)
    # step 5 of 8 is in the middle of the third epoch
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert "GaussianPromptAveraging" in state["stateful_callbacks"]
    resumed = train(tmp_path, [GaussianPromptAveraging(2, 2)], resume=str(tmp_path / "checkpoint-5"), **flag)
    torch.testing.assert_close(resumed, expected)


@pytest.mark.slow
def test_a_training_that_stops_early_is_averaged_over_its_epochs(tmp_path):
    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.epoch >= 2
            return control

    record = Record()
    result = train(tmp_path, [record, GaussianPromptAveraging(1, 2), Stop()])
    weights = gaussian_weights(EPOCHS, 1, 2)[:2]
    torch.testing.assert_close(result, weighted_mean(record.epochs, weights / weights.sum()))


def test_loading_the_best_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="load_best_model_at_end; leave one of the two out"):
        train(
            tmp_path,
            [GaussianPromptAveraging(1, 1)],
            load_best_model_at_end=True,
            save_strategy="epoch",
            eval_strategy="epoch",
        )
