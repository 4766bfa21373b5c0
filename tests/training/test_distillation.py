"""Distillation of a teacher on images without labels: what decides where its logits come from, and what is refused."""

import copy
import logging

import numpy as np
import pytest
import torch
from adapters import as_if_trained
from cases import new_classifier
from conftest import CLASS_NAMES
from datasets import Dataset, IterableDataset
from families import FAMILIES
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.testing import assert_close
from transformers import TrainingArguments

from clip_prompt_peft import CLIPPromptTuningConfig, DistillationTrainer, distillation_loss, method_config
from clip_prompt_peft.data import cache_image_embeds, cache_teacher_logits, with_pixel_values


pytestmark = pytest.mark.usefixtures("own_datasets_cache")
NUM_IMAGES = 12


def pictures(num=NUM_IMAGES):
    values = np.random.default_rng(0).integers(0, 255, size=(num, 60, 52, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in values]


@pytest.fixture
def images(tmp_path):
    """Images without labels, from files as `datasets` saves them."""
    from datasets import load_from_disk

    Dataset.from_dict({"image": pictures(), "name": ["x"] * NUM_IMAGES}).save_to_disk(tmp_path / "images")
    return load_from_disk(tmp_path / "images")


@pytest.fixture
def teacher():
    """Vision and text prompts that are far from the zero-shot model."""
    classifier = new_classifier()
    return as_if_trained(get_peft_model(classifier, method_config("ivlp", classifier)), std=0.3)


@pytest.fixture
def student():
    return new_student()


def new_student(width=64, **fields):
    torch.manual_seed(0)
    classifier = new_classifier()
    width = width or classifier.embed_width
    return get_peft_model(classifier, method_config("promptkd", classifier, projection_dim=width, **fields))


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def width_of(teacher):
    return teacher.get_class_embeds().shape[1]


def trained(folder, teacher, train_set, settings=None, **kwargs):
    student = new_student(width_of(teacher))
    trainer = DistillationTrainer(
        student, arguments(folder, **(settings or {})), teacher=teacher, train_dataset=train_set, **kwargs
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(model):
    return {name: value for name, value in model.state_dict().items() if "learnable_" in name}


def test_the_loss_is_the_divergence_of_all_classes_of_all_images():
    logits, teacher_logits = torch.randn(3, 5), torch.randn(3, 5)
    p, q = (2 * torch.tensor(0.25) * value for value in (teacher_logits, logits))  # temperature 2
    p, q = p.log_softmax(1), q.log_softmax(1)
    expected = 200 * 4 * (p.exp() * (p - q)).sum() / 15
    assert_close(distillation_loss(logits, teacher_logits, 200, temperature=2.0), expected)
    with pytest.raises(ValueError, match=r"must be \(3, 5\), .* got \(3, 4\)"):
        distillation_loss(logits, teacher_logits[:, :4])


def test_cached_logits_the_teachers_pixels_and_the_students_give_the_same_training(
    images, teacher, image_processor, tmp_path
):
    cached = cache_teacher_logits(images, teacher, image_processor)
    assert cached.column_names == ["image", "name", "teacher_logits"]
    assert all(parameter.requires_grad for name, parameter in teacher.named_parameters() if "learnable" in name)
    sets = [
        with_pixel_values(cached, image_processor, unlabeled=True),
        with_pixel_values(images, image_processor, unlabeled=True, teacher_processor=image_processor),
        with_pixel_values(images, image_processor, unlabeled=True),
    ]
    found = [losses(trained(tmp_path, teacher, train_set)) for train_set in sets]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-3)
    assert found[0][-1] < found[0][0]


def test_what_is_saved_answers_alone_as_after_the_training(images, teacher, image_processor, tmp_path, pixel_values):
    train_set = with_pixel_values(images, image_processor, unlabeled=True)
    model = trained(tmp_path, teacher, train_set).model.eval()
    assert_close(model.get_class_embeds(), teacher.get_class_embeds().detach())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(new_classifier(), tmp_path / "adapter").eval()
    del loaded.get_base_model().text_model.encoder
    with torch.no_grad():
        assert_close(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


def test_labels_are_not_used(images, teacher, image_processor, tmp_path):
    results = []
    for label in (0, 3):
        labeled = images.add_column("label", [label] * NUM_IMAGES)
        results.append(adapter_of(trained(tmp_path, teacher, with_pixel_values(labeled, image_processor)).model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_evaluation_during_training_has_labels_and_those_without_have_no_loss(
    images, teacher, image_processor, tmp_path
):
    labeled = with_pixel_values(images.add_column("label", [0] * NUM_IMAGES), image_processor)
    unlabeled = with_pixel_values(images, image_processor, unlabeled=True, teacher_processor=image_processor)
    trainer = trained(tmp_path, teacher, unlabeled)
    trainer.model.eval()
    with torch.no_grad():
        pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in labeled])
        logits = trainer.model(pixel_values=pixels).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(NUM_IMAGES, dtype=torch.long))
    assert trainer.evaluate(labeled)["eval_loss"] == pytest.approx(float(expected), rel=1e-3)
    assert "eval_loss" not in trainer.evaluate(unlabeled)


def test_the_teacher_sees_the_same_crops_by_its_own_processor(images, image_processor):
    other = copy.deepcopy(image_processor)
    other.size = other.crop_size = {"height": 24, "width": 24}
    torch.manual_seed(3)
    rows = with_pixel_values(images, image_processor, augment=True, unlabeled=True, teacher_processor=other)[:]
    large, small = torch.stack(rows["pixel_values"]), torch.stack(rows["teacher_pixel_values"])
    assert large.shape[1:] == (3, 48, 48) and small.shape[1:] == (3, 24, 24)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    correlation = torch.corrcoef(torch.stack([shrunk.flatten(), small.flatten()]))[0, 1]
    assert correlation > 0.9
    torch.manual_seed(3)
    alone = with_pixel_values(images, image_processor, augment=True, unlabeled=True)[:]
    assert_close(torch.stack(alone["pixel_values"]), large)


def test_cached_logits_and_random_crops_exclude_each_other(images, teacher, image_processor):
    cached = cache_teacher_logits(images, teacher, image_processor)
    with pytest.raises(ValueError, match="'teacher_logits' holds what a teacher says of the images as they are"):
        with_pixel_values(cached, image_processor, augment=True, unlabeled=True)


def test_cached_logits_are_those_of_the_teacher_and_replace_older_ones(images, teacher, image_processor):
    older = images.add_column("teacher_logits", [[0.0]] * NUM_IMAGES)
    found = torch.tensor(cache_teacher_logits(older, teacher, image_processor)["teacher_logits"][:])
    pixels = torch.stack(with_pixel_values(images, image_processor, unlabeled=True)[:]["pixel_values"])
    with torch.no_grad():
        assert_close(found, teacher.eval()(pixel_values=pixels).logits, rtol=0, atol=1e-3)


def test_a_transform_of_the_data_set_is_applied_without_labels_too(images, image_processor):
    inverted = images.with_transform(
        lambda batch: {"image": [Image.eval(i, lambda v: 255 - v) for i in batch["image"]]}
    )
    found = with_pixel_values(inverted, image_processor, unlabeled=True)[0]["pixel_values"]
    straight = with_pixel_values(images, image_processor, unlabeled=True)[0]["pixel_values"]
    assert not torch.allclose(found, straight, atol=0.1)


def test_a_stream_without_labels_is_trained_on(teacher, image_processor, tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"image": image} for image in pictures()))
    train_set = with_pixel_values(stream, image_processor, unlabeled=True, teacher_processor=image_processor)
    assert len(losses(trained(tmp_path, teacher, train_set))) == 3


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_a_teacher_of_another_family_has_pixel_values_of_its_own(family, images, image_processor, tmp_path):
    other = FAMILIES[family]
    names = ["cat", "fire truck", "owl", "sun"]
    teacher = other.classifier()
    teacher.set_class_names(names)
    classifier = new_classifier(names)
    student = get_peft_model(classifier, method_config("promptkd", classifier, projection_dim=teacher.embed_width))
    args = arguments(tmp_path)
    train_set = with_pixel_values(images, image_processor, unlabeled=True, teacher_processor=other.image_processor)
    DistillationTrainer(student, args, teacher=teacher, train_dataset=train_set).train()
    without = with_pixel_values(images, image_processor, unlabeled=True)
    with pytest.raises(ValueError, match=f"The teacher is a {family} for .* and the student a CLIP for 48"):
        DistillationTrainer(student, args, teacher=teacher, train_dataset=without).train()


def test_a_student_with_text_prompts_learns_from_cached_embeddings(images, teacher, image_processor, tmp_path):
    """Without a projector, class embeddings are the student's own, and so is the image tower's cache."""
    student = get_peft_model(new_classifier(), CLIPPromptTuningConfig())
    embedded = cache_image_embeds(images.add_column("label", [0] * NUM_IMAGES), student, image_processor)
    logits = cache_teacher_logits(images, teacher, image_processor)["teacher_logits"][:]
    train_set = embedded.add_column("teacher_logits", logits)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=train_set)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_given_embeddings_and_logits_need_no_teacher(images, image_processor, tmp_path):
    student = new_student()
    given = with_pixel_values(
        images.add_column("teacher_logits", torch.randn(NUM_IMAGES, 4).tolist()), image_processor, unlabeled=True
    )
    with pytest.raises(ValueError, match="no class embeddings of a teacher yet"):
        DistillationTrainer(student, arguments(tmp_path), train_dataset=given)
    student.set_teacher_class_embeds(torch.randn(4, 64))
    DistillationTrainer(student, arguments(tmp_path), train_dataset=given).train()
    without = with_pixel_values(images, image_processor, unlabeled=True)
    with pytest.raises(ValueError, match="There is no teacher, and the data set has no column 'teacher_logits'"):
        DistillationTrainer(student, arguments(tmp_path), train_dataset=without).train()


def test_accumulated_steps_have_the_mean_gradient(images, teacher, image_processor, tmp_path):
    """With BatchNorm, the statistics are those of each part of a batch."""
    train_set = with_pixel_values(images, image_processor, unlabeled=True)
    settings = {"per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    plain = trained(tmp_path, teacher, train_set, {**settings, "per_device_train_batch_size": 6, "max_steps": 2})
    accumulated = trained(tmp_path, teacher, train_set, {**settings, "gradient_accumulation_steps": 2})
    assert losses(accumulated)[0] == pytest.approx(sum(losses(plain)) / 2, rel=1e-4)


def test_a_resumed_training_ends_with_the_same_tensors(images, teacher, image_processor, tmp_path):
    train_set = with_pixel_values(images, image_processor, unlabeled=True)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = adapter_of(trained(tmp_path, teacher, train_set, settings).model)
    student = new_student(width_of(teacher))
    resumed = DistillationTrainer(student, arguments(tmp_path, **settings), teacher=teacher, train_dataset=train_set)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in adapter_of(resumed.model).items():
        assert_close(value, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (CLASS_NAMES[::-1], "another order: class 0 of the teacher is 'vehicle', and 'animal' here"),
        ([*CLASS_NAMES, "clock"], "only the teacher has 'clock'"),
        (["Animal", *CLASS_NAMES[1:]], "only the teacher has 'Animal'; only the student has 'animal'"),
    ],
)
def test_a_teacher_of_other_classes_is_refused_by_name(student, teacher, tmp_path, names, message):
    teacher.set_class_names(names)
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher)


def test_teachers_that_do_not_fit_are_refused(student, teacher, tmp_path):
    args, width = arguments(tmp_path), width_of(teacher)
    with pytest.raises(ValueError, match=f"have the width {width}, .*projection_dim=32; .*projection_dim={width}"):
        DistillationTrainer(new_student(32), args, teacher=teacher)
    with pytest.raises(ValueError, match="are one model, or share modules"):
        DistillationTrainer(student, args, teacher=student.get_base_model())
    with pytest.raises(TypeError, match="teacher of DistillationTrainer needs a classifier .* got a Linear"):
        DistillationTrainer(student, args, teacher=torch.nn.Linear(2, 2))
    conditioned = get_peft_model(new_classifier(), CLIPPromptTuningConfig(image_conditioned=True))
    with pytest.raises(ValueError, match="makes its class embeddings for each image"):
        DistillationTrainer(student, args, teacher=conditioned)
    several = new_classifier()
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="The teacher has problem_type='multi_label_classification'"):
        DistillationTrainer(student, args, teacher=several)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_weight": 0}, "kd_weight must be a positive number, got 0"),
        ({"temperature": float("inf")}, "temperature must be a positive number, got inf"),
        ({"compute_loss_func": lambda *_: 0}, "leave out label_smoothing_factor and compute_loss_func"),
    ],
)
def test_settings_that_make_no_sense_are_refused(student, tmp_path, settings, message):
    student = new_student()
    student.set_teacher_class_embeds(torch.randn(4, 64))
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(student, arguments(tmp_path), **settings)


def test_a_teacher_elsewhere_is_told(teacher, tmp_path, caplog, monkeypatch):
    student = new_student(width_of(teacher))
    elsewhere = torch.device("cuda:0")
    monkeypatch.setattr("clip_prompt_peft.training.distillation.execution_device", lambda model: elsewhere)
    with caplog.at_level(logging.WARNING, "clip_prompt_peft.training.distillation"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    assert "The teacher computes on cuda:0, the student on cpu" in caplog.text
