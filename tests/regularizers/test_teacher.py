"""Regularizers in the classifier: their teacher, when they count, and what they refuse."""

import re
import textwrap

import pytest
import torch
from adapters import prompted
from conftest import CLASS_NAMES, ROOT, TINY_CLIP
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.regularizers import REGULARIZERS, KgCoOpRegularizer, Regularizer
from clip_prompt_peft.regularizers.teacher import without_adapters
from clip_prompt_peft.tuner.config_checks import REGULARIZER_WEIGHTS


class Probe(Regularizer):
    """Costs nothing and remembers what it was given."""

    def forward(self, student, teacher):
        self.student, self.teacher = student, teacher
        return student.logits.sum() * 0


@pytest.fixture
def zero_shot(classifier, pixel_values):
    with torch.no_grad():
        return classifier(pixel_values=pixel_values).logits, classifier.get_class_embeds()


IVLP = {"text_prompt_depth": 2, "num_vision_virtual_tokens": 3, "vision_prompt_depth": 2}


@pytest.mark.parametrize("fields", [{}, IVLP], ids=["text", "text_and_vision"])
def test_the_teacher_is_the_zero_shot_model_itself(classifier, zero_shot, pixel_values, labels, fields):
    logits, class_embeds = zero_shot
    model = prompted(classifier, **fields).train()
    classifier.regularizers["probe"] = probe = Probe()
    model(pixel_values=pixel_values, labels=labels)
    torch.testing.assert_close(probe.teacher.logits, logits)
    torch.testing.assert_close(probe.teacher.class_embeds, class_embeds)
    assert not torch.allclose(probe.student.logits, logits, atol=1e-2)
    assert not probe.teacher.logits.requires_grad


def test_the_teacher_averages_un_normalised_embeddings_over_its_templates(classifier, pixel_values, labels):
    templates = ("a photo of a {}.", "a drawing of a small {}.")
    model = prompted(classifier).train()
    classifier.regularizers["probe"] = probe = Probe()
    probe.teacher_templates = templates
    model(pixel_values=pixel_values, labels=labels)
    features = []
    for template in templates:
        texts = classifier.tokenizer(
            [template.format(name) for name in CLASS_NAMES], padding=True, return_tensors="pt"
        )
        with model.disable_adapter(), torch.no_grad():
            features.append(classifier.get_text_features(**texts).pooler_output)
    expected = torch.nn.functional.normalize(sum(features) / 2, dim=-1)
    torch.testing.assert_close(probe.teacher.class_embeds, expected)


def count_text_calls(classifier):
    calls = []
    classifier.text_model.register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_the_teachers_class_embeddings_are_computed_once_until_something_changes(classifier, pixel_values, labels):
    model = prompted(classifier, regularizer="kgcoop").train()
    classifier.class_encoder.path = "plain"  # the one that calls the text model as a whole
    calls = count_text_calls(classifier)
    inputs = {"pixel_values": pixel_values, "labels": labels}

    def calls_of_a_step():
        before = len(calls)
        model(**inputs).loss.backward()
        return len(calls) - before

    assert [calls_of_a_step() for _ in range(3)] == [2, 1, 1]  # the teacher once, the student every time
    classifier.set_class_names(["sun", "moon", "red car", "dog"])
    assert calls_of_a_step() == 2
    with torch.no_grad():
        classifier.text_projection.weight.mul_(1.5)
    assert calls_of_a_step() == 2
    assert calls_of_a_step() == 1


def test_the_teacher_is_neither_trained_nor_saved(classifier, pixel_values, labels):
    model = prompted(classifier, regularizer="promptsrc").train()
    names = set(model.state_dict())
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    assert set(model.state_dict()) == names
    assert [name for name, value in model.named_parameters() if value.grad is not None] == [
        name for name, value in model.named_parameters() if value.requires_grad
    ]


def test_asking_the_teacher_leaves_what_is_trainable_as_it_was(classifier):
    model = prompted(classifier, **IVLP, modules_to_save=["text_projection"]).train()
    model.add_adapter("second", CLIPPromptTuningConfig(num_virtual_tokens=2))
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    with without_adapters(classifier):
        assert classifier.prompt_layout is None
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    assert classifier.prompt_layout is not None


def test_the_term_counts_in_training_only(classifier, pixel_values, labels):
    model = prompted(classifier, regularizer="kgcoop", regularizer_weights={"weight": 5.0}).train()
    inputs = {"pixel_values": pixel_values, "labels": labels}
    terms = model(**inputs, return_loss_terms=True).loss_terms
    assert sorted(terms) == ["cross_entropy", "kgcoop"]
    assert terms["kgcoop"] > 0
    torch.testing.assert_close(model(**inputs).loss, terms["cross_entropy"] + terms["kgcoop"])
    torch.testing.assert_close(model.eval()(**inputs).loss, terms["cross_entropy"])


def test_the_regularizer_comes_and_goes_with_its_adapter(classifier, pixel_values, labels):
    model = prompted(classifier, regularizer="kgcoop").train()
    model.add_adapter("plain", CLIPPromptTuningConfig())
    assert list(classifier.active_regularizers) == ["kgcoop"]
    model.set_adapter("plain")
    assert list(classifier.active_regularizers) == []
    model.set_adapter("default")
    with model.disable_adapter():
        assert list(classifier.active_regularizers) == []
    assert list(classifier.active_regularizers) == ["kgcoop"]


def test_a_regularizer_of_ones_own_works_with_lora_too(pixel_values, labels):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    with torch.no_grad():
        zero_shot = model.eval().get_class_embeds()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    model.regularizers["mine"] = KgCoOpRegularizer(weight=2.0)
    terms = lora(pixel_values=pixel_values, labels=labels, return_loss_terms=True).loss_terms
    cosines = (model.get_class_embeds() * zero_shot).sum(dim=-1)
    torch.testing.assert_close(terms["mine"], 2 * (1 - cosines.mean()))
    assert terms["mine"] > 0


def test_training_without_labels_is_refused_while_a_regularizer_is_active(classifier, pixel_values):
    model = prompted(classifier, regularizer="kgcoop").train()
    with pytest.raises(ValueError, match=r"\['kgcoop'\] .* forward got none; leave out label_smoothing_factor"):
        model(pixel_values=pixel_values)
    assert model.eval()(pixel_values=pixel_values).loss is None


def test_prograd_is_refused_by_a_training_step_that_knows_nothing_of_it(classifier, pixel_values, labels):
    model = prompted(classifier, regularizer="prograd").train()
    with pytest.raises(ValueError, match="'prograd' .* changes its gradient.* train with ProGradTrainer"):
        model(pixel_values=pixel_values, labels=labels)


def test_training_on_image_embeddings_is_refused_with_vision_prompts(classifier, pixel_values, labels):
    model = prompted(classifier, num_vision_virtual_tokens=2).train()
    embeds = classifier.get_image_features(pixel_values).pooler_output.detach()
    with pytest.raises(ValueError, match="vision prompts, so image embeddings made in advance would leave these"):
        model(image_embeds=embeds, labels=labels)
    expected = model.eval()(pixel_values=pixel_values).logits
    torch.testing.assert_close(model(image_embeds=embeds).logits, expected)


def test_a_new_regularizer_is_one_class_and_a_row_in_two_tables(classifier, pixel_values, labels, monkeypatch):
    """The example of CONTRIBUTING.md, run as it stands there."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n( +\"\"\"Logits stay.*?)```", guide, flags=re.DOTALL)
    namespace = {"__name__": "clip_prompt_peft.regularizers.squared"}
    exec(textwrap.dedent(code).replace("from .base", "from clip_prompt_peft.regularizers.base"), namespace)
    first_row, second_row = re.findall(r"```python\n +\"squared\": (.*),\n", guide)
    monkeypatch.setitem(REGULARIZERS, "squared", eval(first_row, namespace))
    monkeypatch.setitem(REGULARIZER_WEIGHTS, "squared", eval(second_row))

    model = prompted(classifier, regularizer="squared", regularizer_weights={"weight": 0.5}).train()
    terms = model(pixel_values=pixel_values, labels=labels, return_loss_terms=True).loss_terms
    student = model.eval()(pixel_values=pixel_values).logits
    with model.disable_adapter():
        zero_shot = model(pixel_values=pixel_values).logits
    torch.testing.assert_close(terms["squared"], 0.5 * (student - zero_shot).square().mean())
