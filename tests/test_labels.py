"""Labels of a training step on a device are checked one step later, without a wait of the host."""

import contextlib
import copy
import pickle

import pytest
import torch
from adapters import as_if_trained, fitted
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import PRESETS, CLIPForPromptClassification, CLIPPromptTuningConfig, method_config
from clip_prompt_peft.labels import LabelCheck, check_indices, without_wrong_indices
from clip_prompt_peft.training.configs import PEFT_METHODS
from clip_prompt_peft.tuner.base_config import MULTI_LABEL


LATER = r"Label 4 is out of range: the model has 4 classes.*\(animal, plant.*up to one step was taken"
BAD = torch.tensor([0, 4, 1])


@pytest.fixture
def image_embeds(classifier):
    return torch.randn(3, classifier.embed_width)


@pytest.fixture
def model(classifier):
    """A model whose labels are checked as on a device."""
    classifier.label_check = LabelCheck(at_once_on=())
    return get_peft_model(classifier, CLIPPromptTuningConfig()).train()


def reads():
    """What has to tell of a wrong label of the step before."""

    def forward(model, image_embeds, folder):
        model(image_embeds=image_embeds, labels=torch.tensor([0, 1, 2]))

    return {
        "forward": forward,
        "forward without labels": lambda model, image_embeds, folder: model(image_embeds=image_embeds),
        "train": lambda model, image_embeds, folder: model.train(),
        "eval": lambda model, image_embeds, folder: model.eval(),
        "save_pretrained": lambda model, image_embeds, folder: model.save_pretrained(folder),
        "save a classifier": lambda model, image_embeds, folder: model.get_base_model().save_pretrained(folder),
        "state_dict": lambda model, image_embeds, folder: model.state_dict(),
        "pickle": lambda model, image_embeds, folder: pickle.dumps(model),
        "deepcopy": lambda model, image_embeds, folder: copy.deepcopy(model),
    }


@pytest.mark.parametrize("read", reads().values(), ids=reads())
def test_a_wrong_label_is_told_after_the_step_and_once(model, image_embeds, read, tmp_path):
    loss = model(image_embeds=image_embeds, labels=BAD).loss
    loss.backward()
    folder = tmp_path / "saved"
    with pytest.raises(ValueError, match=LATER):
        read(model, image_embeds, folder)
    assert not folder.exists()
    read(model, image_embeds, folder)


def test_the_image_of_a_wrong_label_is_left_out_of_the_loss(model, image_embeds):
    loss = model(image_embeds=image_embeds, labels=BAD).loss
    model.get_base_model().label_check = LabelCheck(at_once_on=())
    assert loss == model(image_embeds=image_embeds[[0, 2]], labels=BAD[[0, 2]]).loss


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("preset", [None, "kgcoop", "prograd", "promptsrc"])
def test_a_batch_of_wrong_labels_changes_nothing_and_is_told(classifier, pixel_values, preset, loss):
    classifier.label_check = LabelCheck(at_once_on=())
    classifier.config.classification_loss = loss
    config = CLIPPromptTuningConfig.from_preset(preset, model=classifier) if preset else CLIPPromptTuningConfig()
    model = as_if_trained(get_peft_model(classifier, config)).train()
    output = model(pixel_values=pixel_values, labels=torch.tensor([4, -1, 99]), return_loss_terms=True)
    assert output.loss_terms["cross_entropy"] == 0
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert preset in ("kgcoop", "promptsrc") or not any(gradient.any() for gradient in gradients)
    with pytest.raises(ValueError, match=LATER):
        model(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_evaluation_checks_at_once(model, image_embeds, how):
    model.train(how != "eval")
    context = torch.no_grad() if how == "no_grad" else contextlib.nullcontext()
    with context, pytest.raises(ValueError, match=r"Label 4 is out of range(?!.*step was taken)"):
        model(image_embeds=image_embeds, labels=BAD)


def test_a_cpu_checks_at_once_in_training_too(classifier, image_embeds):
    with pytest.raises(ValueError, match=r"Label 4 is out of range(?!.*step was taken)"):
        classifier.train()(image_embeds=image_embeds, labels=BAD)


@pytest.mark.parametrize("labels", [torch.zeros(3, 4), [0, 1, 2], torch.tensor(1)])
def test_a_wrong_shape_is_told_at_once(model, image_embeds, labels):
    with pytest.raises((TypeError, ValueError), match="labels must be"):
        model(image_embeds=image_embeds, labels=labels)


def test_labels_may_be_written_over_after_the_step(model, image_embeds):
    labels = torch.tensor([0, 1, 2])
    model(image_embeds=image_embeds, labels=labels)
    labels.fill_(99)
    model.eval()


def test_copies_check_as_the_original_does(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_base_model().label_check.at_once_on == ()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("num_classes", [3, 1000])
def test_what_is_replaced_is_what_is_refused(dtype, num_classes):
    values = [0, 1, 2, 3, 100] + ([] if dtype == torch.uint8 else [-1, -100, -101])
    values += [0.5, float("nan"), float("inf")] if dtype.is_floating_point else []
    for value in values:
        labels = torch.tensor([value]).to(dtype)
        replaced = without_wrong_indices(labels, num_classes)
        try:
            check_indices(labels, ["name"] * num_classes)
            assert replaced == labels
        except ValueError:
            assert replaced.tolist() == [-100]


def test_an_empty_batch_passes(model, image_embeds):
    model(image_embeds=image_embeds[:0], labels=torch.tensor([], dtype=torch.long))
    model.eval()


@pytest.mark.parametrize("ignored", [[], [1], [0, 2], [0, 1, 2]])
def test_the_sigmoid_loss_is_that_of_the_images_that_are_not_ignored(classifier, image_embeds, ignored):
    classifier.config.classification_loss = "sigmoid"
    labels = torch.tensor([0, 3, 1])
    labels[ignored] = -100
    image_embeds[ignored] = float("inf")  # whatever these images give has no effect
    found = classifier(image_embeds=image_embeds, labels=labels).loss
    kept = image_embeds[labels >= 0]
    logits = classifier(image_embeds=kept).logits
    targets = torch.nn.functional.one_hot(labels[labels >= 0], 4).float()
    summed = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    torch.testing.assert_close(found, summed / max(1, len(kept)))


# A step on the meta device raises wherever the host would need a value of the device.


def step_on_meta(preset, problem_type=None, loss="softmax", at_once_on=("cpu",)):
    classifier = CLIPForPromptClassification.from_pretrained(
        TINY_CLIP, class_names=CLASS_NAMES, problem_type=problem_type
    )
    classifier.config.classification_loss = loss
    config = method_config(preset, classifier) if preset else CLIPPromptTuningConfig()
    model = as_if_trained(fitted(get_peft_model(classifier, config))).train().to("meta")
    classifier.label_check = LabelCheck(at_once_on=at_once_on)
    labels = torch.zeros(3, 4) if problem_type else torch.zeros(3, dtype=torch.long)
    pixel_values = torch.zeros(3, 3, 48, 48, device="meta")
    for _ in range(2):
        terms = model(pixel_values=pixel_values, labels=labels.to("meta"), return_loss_terms=True)
        sum(terms.loss_terms.values(), terms.loss).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture
def no_waiting(monkeypatch):
    """Autocast does not know the meta device, and the teacher's embeddings were computed before."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(
        "clip_prompt_peft.regularizers.teacher._mean_class_embeds",
        lambda model, templates: torch.empty(len(CLASS_NAMES), model.embed_width, device="meta"),
    )


@pytest.mark.parametrize("preset", [None, *PRESETS, *(name for name in PEFT_METHODS if name != "tip-adapter")])
def test_a_step_reads_no_value_of_the_device(no_waiting, preset):
    step_on_meta(preset)


@pytest.mark.parametrize(("problem_type", "loss"), [(MULTI_LABEL, "softmax"), (None, "sigmoid")])
def test_nor_does_a_step_with_another_loss(no_waiting, problem_type, loss):
    step_on_meta(None, problem_type, loss)


def test_the_meta_device_notices_a_check_at_once(no_waiting):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_on_meta(None, at_once_on=("cpu", "meta"))


class TestTheTeacherOnADevice:
    """Its embeddings are kept without a look at the values of weights, for which the host would have to wait."""

    @pytest.fixture
    def model(self, classifier, monkeypatch):
        monkeypatch.setattr("clip_prompt_peft.text.cache.NEAR", ())
        classifier.add_adapter(LoraConfig(target_modules=r"text_model.*q_proj", init_lora_weights=False), "lora")
        model = get_peft_model(classifier, CLIPPromptTuningConfig(regularizer="kgcoop")).train()
        monkeypatch.setattr(torch, "equal", None)  # raises where values are compared
        return model

    @pytest.fixture
    def num_computed(self, monkeypatch):
        computed = []

        def compute(model, templates):
            computed.append(templates)
            return torch.ones(len(CLASS_NAMES), model.embed_width)

        monkeypatch.setattr("clip_prompt_peft.regularizers.teacher._mean_class_embeds", compute)
        return lambda: len(computed)

    def test_they_are_kept_until_a_weight_is_changed_or_merged(self, model, num_computed, image_embeds):
        def step():
            model(image_embeds=image_embeds, labels=torch.tensor([0, 1, 2])).loss.backward()
            return num_computed()

        assert step() == step() == 1
        text = model.get_base_model().text_model
        with torch.no_grad():
            text.final_layer_norm.bias.add_(1.0)
        assert step() == step() == 2
        layer = text.encoder.layers[0].self_attn.q_proj
        layer.merge(adapter_names=["lora"])
        assert step() == step() == 3
        layer.unmerge()
        assert step() == step() == 4
