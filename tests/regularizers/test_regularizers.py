"""Loss terms on embeddings that one can count by hand, without a model."""

import inspect
import math

import pytest
import torch

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.regularizers import (
    REGULARIZERS,
    KgCoOpRegularizer,
    Prediction,
    ProGradRegularizer,
    PromptSRCRegularizer,
    build_regularizer,
    project_gradient,
)
from clip_prompt_peft.regularizers.promptsrc import mean_distance, mean_divergence
from clip_prompt_peft.tuner.config_checks import REGULARIZER_WEIGHTS


IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # (B, E)
CLASSES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])  # (C, E)
NO_SCALE = torch.tensor(0.0)


def prediction(image_embeds=IMAGES, class_embeds=CLASSES, logit_scale=NO_SCALE):
    return Prediction.of(image_embeds, class_embeds, logit_scale)


def test_logits_are_scaled_cosines():
    logits = prediction(2 * IMAGES, logit_scale=torch.tensor(math.log(10.0))).logits
    torch.testing.assert_close(logits, torch.tensor([[10.0, 0.0, 6.0], [0.0, 10.0, 8.0]]))


def test_class_embeddings_of_each_image_score_that_image_only():
    own = torch.stack([CLASSES, CLASSES.flip(0)])  # (B, C, E)
    logits = prediction(class_embeds=own).logits
    torch.testing.assert_close(logits, torch.tensor([[1.0, 0.0, 0.6], [0.8, 1.0, 0.0]]))


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_a_term_is_a_scalar_with_a_gradient_for_shared_and_for_conditioned_class_embeddings(name):
    for class_embeds in (CLASSES.clone(), CLASSES.expand(2, 3, 2).clone()):
        class_embeds.requires_grad_()
        student = prediction(class_embeds=class_embeds)
        term = build_regularizer(name)(student, prediction(class_embeds=CLASSES.flip(0)))
        assert term.shape == ()
        term.backward()
        assert class_embeds.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["kgcoop", "promptsrc"])
def test_a_student_equal_to_its_teacher_costs_nothing(name):
    assert build_regularizer(name)(prediction(), prediction()).item() == pytest.approx(0, abs=1e-6)


def test_kgcoop_is_one_minus_the_mean_cosine_times_its_weight():
    teacher = prediction(class_embeds=torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert KgCoOpRegularizer(weight=3.0)(prediction(), teacher).item() == pytest.approx(3 * (1 - (1 + 0 + 0.6) / 3))


def test_the_distance_is_the_mean_over_all_entries():
    assert mean_distance(CLASSES, torch.zeros(3, 2)).item() == pytest.approx((1 + 1 + 0.6 + 0.8) / 6)


def test_the_divergence_is_divided_by_the_number_of_logits():
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4 and 1/4 for the first image
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert mean_divergence(student, teacher).item() == pytest.approx(expected / 4)


@pytest.mark.parametrize("weight", ["text", "image", "logits"])
def test_each_weight_of_promptsrc_counts_its_own_part(weight):
    student = prediction()
    teacher = prediction(IMAGES.flip(0), CLASSES.roll(1, dims=0))
    off = {"text": 0.0, "image": 0.0, "logits": 0.0}
    parts = {
        "text": mean_distance(student.class_embeds, teacher.class_embeds),
        "image": mean_distance(student.image_embeds, teacher.image_embeds),
        "logits": mean_divergence(student.logits, teacher.logits),
    }
    assert parts[weight] > 0
    term = PromptSRCRegularizer(**{**off, weight: 2.0})(student, teacher)
    assert term.item() == pytest.approx(2 * parts[weight].item())


def test_prograd_is_a_cross_entropy_with_the_teachers_probabilities():
    student, teacher = prediction(), prediction(class_embeds=CLASSES.flip(0))
    expected = torch.nn.functional.cross_entropy(student.logits, teacher.logits.softmax(dim=-1))
    assert ProGradRegularizer()(student, teacher).item() == pytest.approx(expected.item())
    at_two = torch.nn.functional.cross_entropy(student.logits / 2, (teacher.logits / 2).softmax(dim=-1)) * 4
    assert ProGradRegularizer(temperature=2.0)(student, teacher).item() == pytest.approx(at_two.item())


def test_a_gradient_along_general_knowledge_is_left_as_it_is():
    gradient = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert torch.equal(project_gradient(gradient, torch.tensor([[1.0, 0.0], [5.0, 0.0]])), gradient)


@pytest.mark.parametrize(("projection", "expected"), [(1.0, 0.0), (0.8, -0.6), (0.0, -3.0)])
def test_the_opposing_component_of_a_gradient_is_taken_out(projection, expected):
    found = project_gradient(torch.tensor([-3.0, 4.0]), torch.tensor([2.0, 0.0]), projection)
    torch.testing.assert_close(found, torch.tensor([expected, 4.0]))


def test_a_tensor_is_compared_as_a_whole_and_not_row_by_row():
    gradient = torch.tensor([[-1.0, 0.0], [2.0, 0.0]])  # opposes in the first row, but not in sum
    assert torch.equal(project_gradient(gradient, torch.ones(2, 2)), gradient)


def test_without_a_general_direction_nothing_is_projected():
    gradient = torch.tensor([-1.0, 2.0])
    assert torch.equal(project_gradient(gradient, torch.zeros(2)), gradient)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("kg-coop", None, r"must be one of \['kgcoop', 'prograd', 'promptsrc'\] or None, got 'kg-coop'"),
        ("kgcoop", {"text": 1.0}, r"of 'kgcoop' may be \['weight'\], got 'text'"),
        ("kgcoop", {"weight": -1.0}, r"\['weight'\] must be a number of at least 0, got -1.0"),
        ("kgcoop", {"weight": "8"}, r"must be a number of at least 0, got '8'"),
        ("promptsrc", {"image": float("nan")}, "must be a number of at least 0, got nan"),
        ("prograd", {"temperature": 0}, "temperature must be positive, got 0"),
    ],
)
def test_an_unknown_regularizer_or_a_bad_weight_is_refused(name, weights, message):
    with pytest.raises(ValueError, match=message):
        CLIPPromptTuningConfig(regularizer=name, regularizer_weights=weights)


def test_the_configurations_table_names_the_weights_that_the_regularizers_take():
    weights = {name: tuple(inspect.signature(regularizer).parameters) for name, regularizer in REGULARIZERS.items()}
    assert weights == REGULARIZER_WEIGHTS
