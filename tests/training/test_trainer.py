"""Tests of the classifier with the stock Trainer and no special arguments."""

import io
import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import EMOJI, TINY_CLIP, slow_param
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig


NAMES = ["animal", "plant", "food", "vehicle", "building", "clothing"]
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def dataset():
    """Black-and-white icons, 4 per class, with a column that the model does not accept."""
    rows = pq.read_table(EMOJI / "fluenthc-train.parquet").to_pylist()
    rows = [row for label in range(len(NAMES)) for row in [r for r in rows if r["label"] == label][:4]]
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    columns = {
        "pixel_values": processor(images, return_tensors="np").pixel_values,
        "labels": [row["label"] for row in rows],
        "name": [row["name"] for row in rows],
    }
    return Dataset.from_dict(columns).with_format("torch")


@pytest.fixture(scope="module")
def embedded_dataset(dataset):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    with torch.no_grad():
        embeds = model.get_image_features(dataset["pixel_values"][:]).pooler_output
    return dataset.remove_columns("pixel_values").add_column("image_embeds", embeds.tolist())


def new_model(adapter_name="default", **config):
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)
    return get_peft_model(classifier, CLIPPromptTuningConfig(**config), adapter_name=adapter_name)


def new_trainer(model, dataset, output_dir, compute_metrics=None, **kwargs):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**settings, **kwargs})
    return Trainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, compute_metrics=compute_metrics
    )


def vectors_of(model, adapter_name="default"):
    classifier = model if isinstance(model, CLIPForPromptClassification) else model.get_base_model()
    return classifier.text_model.embeddings.learnable_embeddings[adapter_name].detach().clone()


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class TestTraining:
    @pytest.mark.parametrize("column", ["pixel_values", "image_embeds"])
    def test_lowers_the_loss_and_moves_the_vectors_only(self, dataset, embedded_dataset, tmp_path, column):
        data = dataset if column == "pixel_values" else embedded_dataset
        model = new_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = new_trainer(model, data, tmp_path)
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < first - 0.1
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert len(changed) == 1 and "learnable_embeddings" in changed[0]

    def test_on_embeddings_equals_training_on_their_images(self, dataset, embedded_dataset, tmp_path):
        on_images, on_embeds = new_model(), new_model()
        new_trainer(on_images, dataset, tmp_path, max_steps=2).train()
        new_trainer(on_embeds, embedded_dataset, tmp_path, max_steps=2).train()
        torch.testing.assert_close(vectors_of(on_embeds), vectors_of(on_images), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("steps", [2, slow_param(4)])
    def test_with_gradient_accumulation_equals_one_large_batch(self, embedded_dataset, tmp_path, steps):
        large, accumulated = new_model(), new_model()
        at_once = new_trainer(large, embedded_dataset, tmp_path)
        in_parts = new_trainer(
            accumulated,
            embedded_dataset,
            tmp_path,
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
        )
        at_once.train()
        in_parts.train()
        assert losses_of(in_parts) == pytest.approx(losses_of(at_once), abs=1e-5)
        torch.testing.assert_close(vectors_of(accumulated), vectors_of(large), rtol=0, atol=1e-6)

    @pytest.mark.slow
    def test_with_bf16_follows_training_in_float32(self, dataset, tmp_path):
        full, half = new_model(), new_model()
        in_full = new_trainer(full, dataset, tmp_path)
        in_half = new_trainer(half, dataset, tmp_path, bf16=True)
        in_full.train()
        in_half.train()
        assert vectors_of(half).dtype == torch.float32
        assert losses_of(in_half) == pytest.approx(losses_of(in_full), abs=0.05)
        assert losses_of(in_half) != losses_of(in_full)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
    def test_with_gradient_checkpointing_gives_the_same_losses(self, dataset, tmp_path):
        plain = new_trainer(new_model(), dataset, tmp_path, max_steps=3)
        frugal = new_trainer(new_model(), dataset, tmp_path, max_steps=3, gradient_checkpointing=True)
        plain.train()
        frugal.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in frugal.model.modules())
        assert losses_of(frugal) == pytest.approx(losses_of(plain), abs=1e-5)
        torch.testing.assert_close(vectors_of(frugal.model), vectors_of(plain.model), rtol=0, atol=1e-6)

    def test_with_label_smoothing_uses_the_smoothed_loss(self, embedded_dataset, tmp_path):
        epsilon = 0.2
        model = new_model()
        with torch.no_grad():
            logits = model(image_embeds=embedded_dataset["image_embeds"][:]).logits
        expected = torch.nn.functional.cross_entropy(logits, embedded_dataset["labels"][:], label_smoothing=epsilon)
        trainer = new_trainer(
            model, embedded_dataset, tmp_path, label_smoothing_factor=epsilon, per_device_train_batch_size=NUM_IMAGES
        )
        trainer.train()
        assert losses_of(trainer)[0] == pytest.approx(float(expected), abs=1e-5)
        assert losses_of(trainer)[-1] < losses_of(trainer)[0]


class TestEvaluation:
    def test_reports_the_mean_loss_and_metrics_of_the_logits(self, embedded_dataset, tmp_path):
        model = new_model()
        labels = embedded_dataset["labels"][:]
        with torch.no_grad():
            expected = model(image_embeds=embedded_dataset["image_embeds"][:], labels=labels)
        trainer = new_trainer(model, embedded_dataset, tmp_path, accuracy, per_device_eval_batch_size=7)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(float(expected.loss), abs=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx(float((expected.logits.argmax(-1) == labels).float().mean()))

    def test_predict_returns_one_row_of_logits_per_image(self, dataset, tmp_path):
        model = new_model()
        prediction = new_trainer(model, dataset, tmp_path).predict(dataset)
        assert prediction.predictions.shape == (NUM_IMAGES, len(NAMES))
        assert np.array_equal(prediction.label_ids, dataset["labels"][:].numpy())

    def test_predicts_logits_alone_when_the_config_asks_for_hidden_states(self, dataset, tmp_path):
        model = new_model()
        model.config.vision_config.output_hidden_states = True
        prediction = new_trainer(model, dataset, tmp_path, accuracy).predict(dataset)
        assert prediction.predictions.shape == (NUM_IMAGES, len(NAMES))

    def test_works_without_labels(self, embedded_dataset, tmp_path):
        prediction = new_trainer(new_model(), embedded_dataset, tmp_path).predict(
            embedded_dataset.remove_columns("labels")
        )
        assert prediction.predictions.shape == (NUM_IMAGES, len(NAMES)) and prediction.label_ids is None


class TestCheckpoints:
    def test_hold_the_adapter_and_no_weights_of_the_base_model(self, embedded_dataset, tmp_path):
        new_trainer(new_model(), embedded_dataset, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir()}
        assert set(sizes) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "trainer_state.json",
            "training_args.bin",
        }
        assert sizes["adapter_model.safetensors"] < 4 * 128 * 4 + 256  # n virtual tokens of D floats, and a header
        assert sum(sizes.values()) < 64 * 1024

    def test_load_as_a_classifier(self, embedded_dataset, tmp_path):
        model = new_model()
        new_trainer(model, embedded_dataset, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "checkpoint-2")
        assert torch.equal(vectors_of(again), vectors_of(model)) and again.class_names == NAMES

    @pytest.mark.slow
    @pytest.mark.parametrize("adapter_name", ["default", "icons"])
    def test_resuming_gives_the_results_of_an_uninterrupted_run(self, embedded_dataset, tmp_path, adapter_name):
        saving = {"save_strategy": "steps", "save_steps": 3}
        uninterrupted = new_trainer(new_model(adapter_name), embedded_dataset, tmp_path, **saving)
        uninterrupted.train()
        resumed = new_trainer(new_model(adapter_name, prompt_tuning_init="RANDOM"), embedded_dataset, tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses_of(resumed) == losses_of(uninterrupted)
        assert torch.equal(vectors_of(resumed.model, adapter_name), vectors_of(uninterrupted.model, adapter_name))

    def test_the_best_checkpoint_is_loaded_at_the_end(self, embedded_dataset, tmp_path):
        scores = itertools.chain([0.5, 0.9, 0.1], itertools.repeat(0.0))
        trainer = new_trainer(
            new_model(),
            embedded_dataset,
            tmp_path,
            lambda prediction: {"score": next(scores)},
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        best, last = (
            vectors_of(AutoPeftModelForPromptClassification.from_pretrained(tmp_path / f"checkpoint-{step}"))
            for step in (2, 3)
        )
        assert torch.equal(vectors_of(trainer.model), best) and not torch.equal(best, last)


class TestAddedByTransformers:
    """An adapter added with `classifier.add_adapter(config)`, without a PeftModel."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES)
        model.add_adapter(CLIPPromptTuningConfig())
        return model

    @pytest.mark.slow
    def test_trains_to_the_same_vectors_as_a_peft_model(self, model, embedded_dataset, tmp_path):
        peft_model = new_model()
        new_trainer(peft_model, embedded_dataset, tmp_path).train()
        new_trainer(model, embedded_dataset, tmp_path).train()
        assert torch.equal(vectors_of(model), vectors_of(peft_model))

    def test_saves_the_adapter_only(self, model, embedded_dataset, tmp_path):
        trainer = new_trainer(model, embedded_dataset, tmp_path, max_steps=1)
        trainer.train()
        trainer.save_model()
        assert {path.name for path in tmp_path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "training_args.bin",
        }
        again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
        assert torch.equal(vectors_of(again), vectors_of(model)) and again.class_names == NAMES
