"""Options of the Trainer that touch the inputs or the labels of a batch, with images and with their embeddings."""

import numpy as np
import pytest
import torch
from conftest import EMOJI, TINY_CLIP, needs_compile, slow_param
from families import FAMILIES
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.data import cache_image_embeds, class_names_of, load_image_dataset, with_pixel_values
from clip_prompt_peft.evaluation.metrics import compute_metrics


OPTIONS = {
    "defaults": {},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "accumulation": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "smoothing": {"label_smoothing_factor": 0.1},
    "as_in_the_example_script": {"remove_unused_columns": False, "label_names": ["labels"]},
    "metrics": {"include_for_metrics": ["loss"], "eval_accumulation_steps": 1, "eval_use_gather_object": True},
    "batches_apart": {"eval_do_concat_batches": False},
    "half_precision": {"bf16": True, "bf16_full_eval": True},
    "half_precision_evaluation": {"fp16_full_eval": True},
    "noise": {"neftune_noise_alpha": 5.0},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "batch_size": {"auto_find_batch_size": True},
    "order": {"train_sampling_strategy": "sequential"},
    "dispatch": {"accelerator_config": {"dispatch_batches": True}},
}
COMMON = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def dataset():
    """Nine icons, with columns that no model takes."""
    files = {"train": str(EMOJI / "noto-train.parquet")}
    dataset = load_image_dataset(files=files)["train"].select(range(0, 180, 20))
    return dataset.add_column("name", list("abcdefghi")).add_column("id", list(range(9)))


@pytest.fixture
def model(dataset):
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset))
    return get_peft_model(classifier, CLIPPromptTuningConfig())


def run(model, examples, folder, **options):
    """Trains an epoch, and returns predictions and metrics. The vectors have moved."""
    arguments = {**COMMON, "report_to": [], "save_strategy": "no", **options}
    trainer = Trainer(
        model, TrainingArguments(folder, **arguments), train_dataset=examples, eval_dataset=examples,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    trained = [(parameter, parameter.detach().clone()) for parameter in model.parameters() if parameter.requires_grad]
    trainer.train()
    assert trained and all(not torch.equal(parameter, before) for parameter, before in trained)
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and 0 <= metrics["eval_accuracy"] <= 1
    return trainer.predict(examples)


@pytest.mark.parametrize("options", ["defaults", *map(slow_param, list(OPTIONS)[1:])])
@pytest.mark.parametrize("kind", ["pixels", "embeds"])
def test_trains_and_evaluates(kind, options, model, dataset, image_processor, tmp_path):
    if kind == "pixels":
        examples = with_pixel_values(dataset, image_processor)
    else:
        examples = cache_image_embeds(dataset, model, image_processor)
    prediction = run(model, examples, tmp_path, **OPTIONS[options])
    labels = prediction.label_ids
    labels = np.concatenate(labels) if isinstance(labels, list) else labels
    assert labels.tolist() == dataset["label"][:]


@pytest.mark.slow
@needs_compile
def test_trains_compiled_with_one_number_of_classes_after_another(dataset, image_processor, tmp_path):
    torch._dynamo.reset()
    for num_more in range(3):  # from the second number on, torch compiles for numbers that vary
        names = class_names_of(dataset) + [f"class {i}" for i in range(num_more)]
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names)
        model = get_peft_model(classifier, CLIPPromptTuningConfig())
        examples = with_pixel_values(dataset, image_processor)
        run(model, examples, tmp_path, torch_compile=True, torch_compile_backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_arguments_serve_every_family(name, dataset, tmp_path):
    family = FAMILIES[name]
    model = get_peft_model(family.classifier(class_names=class_names_of(dataset)), CLIPPromptTuningConfig())
    run(model, with_pixel_values(dataset, family.image_processor), tmp_path)


def test_columns_are_selected_and_filtered_as_of_any_dataset(dataset, image_processor):
    examples = with_pixel_values(dataset, image_processor)
    assert examples.column_names == ["pixel_values", "labels"]
    assert examples.features["labels"] == dataset.features["label"]
    assert len(examples.select([0, 2])) == 2
    first = dataset["label"][0]
    kept = examples.filter(lambda label: label == first, input_columns="labels")
    assert {int(example["labels"]) for example in kept} == {first}
    assert kept[0]["pixel_values"].shape == (3, 48, 48)


class TestLabels:
    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint64, torch.float32, torch.float64]
    )
    def test_whole_numbers_of_any_type(self, dtype, classifier, pixel_values, labels):
        expected = classifier(pixel_values=pixel_values, labels=labels).loss
        assert torch.equal(classifier(pixel_values=pixel_values, labels=labels.to(dtype)).loss, expected)

    def test_true_and_false_are_the_second_and_the_first_class(self, classifier, pixel_values):
        true = torch.tensor([True, False, True])
        expected = classifier(pixel_values=pixel_values, labels=true.long()).loss
        assert torch.equal(classifier(pixel_values=pixel_values, labels=true).loss, expected)

    def test_a_small_type_is_compared_with_many_classes(self, classifier, pixel_values):
        classifier.set_class_names([f"kind {number}" for number in range(200)])
        for dtype in (torch.int8, torch.uint8):
            assert classifier(pixel_values=pixel_values, labels=torch.tensor([1, 2, 3], dtype=dtype)).loss.isfinite()

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            ([0, 1, 2], TypeError, "labels must be a tensor, got a list"),
            (np.array([0, 1, 2]), TypeError, "labels must be a tensor, got a ndarray"),
            (torch.eye(4, dtype=torch.long)[:3], ValueError, r"got the shape \(3, 4\).*argmax"),
            (torch.eye(4)[:3], ValueError, r"got the shape \(3, 4\).*argmax"),
            (torch.tensor([[0], [1], [2]]), ValueError, r"got the shape \(3, 1\)"),
            (torch.tensor(1), ValueError, r"got the shape \(\)"),
            (torch.tensor([0.0, 0.5, 1.0]), ValueError, "class indices, got 0.5"),
            (torch.tensor([0.0, float("nan"), 1.0]), ValueError, "got nan, which stands for a missing label"),
            (torch.tensor([0.0, float("inf"), 1.0]), ValueError, "out of range|class indices"),
            (torch.tensor([0, 4, 1], dtype=torch.int8), ValueError, "Label 4 is out of range"),
        ],
    )
    def test_others_are_refused(self, labels, error, message, classifier, pixel_values):
        with pytest.raises(error, match=message):
            classifier(pixel_values=pixel_values, labels=labels)

    def test_images_that_are_no_tensors_are_refused(self, classifier, dataset):
        with pytest.raises(TypeError, match="pixel_values must be a tensor, got a list.*image_processor"):
            classifier(pixel_values=dataset["image"][:2])
        with pytest.raises(TypeError, match="image_embeds must be a tensor, got a ndarray"):
            classifier(image_embeds=np.zeros((2, 64)))
