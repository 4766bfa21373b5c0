"""What is no longer used goes away; many more times with `python benchmarks/leaks.py`."""

import gc
import weakref

import pytest
import torch
from adapters import layer_of


pytestmark = pytest.mark.slow  # many models, and the garbage collector after each


@pytest.fixture
def leaks(benchmarks_on_path):
    import leaks

    return leaks


def alive(leaks, action, *rounds):
    """Tensors after each round of calls. The first one fills what libraries keep for good."""
    counts = []
    for numbers in rounds:
        for number in numbers:
            action(number)
        counts.append(leaks.count_alive()[0])
    return counts


def test_adapters_that_are_added_used_and_deleted_leave_no_tensor_behind(leaks):
    model = leaks.classifier_with_adapter()
    kinds = len(leaks.PRESET_NAMES)
    _, before, after = alive(
        leaks,
        lambda number: leaks.adapter_cycle(model, number),
        range(kinds),
        range(kinds, kinds + 1),
        range(kinds + 1, 2 * kinds + 1),  # ends with the same kind as the round before
    )
    assert after == before


def test_forward_passes_leave_no_tensor_behind(leaks):
    model = leaks.classifier_with_adapter()
    _, before, after = alive(
        leaks, lambda number: leaks.forward(model, number), range(100, 104), range(104, 108), range(200, 232)
    )
    assert after == before


@pytest.mark.parametrize("preset", ["coop-csc", "cocoop", "promptsrc"])
def test_a_training_goes_away_with_its_model_and_its_teacher(leaks, tmp_path, preset):
    trainer = leaks.training(str(tmp_path), preset)
    base = trainer.model.get_base_model()
    gone = [weakref.ref(thing) for thing in (trainer, trainer.model, base, base.class_encoder, base.teacher)]
    gone += [weakref.ref(parameter) for parameter in trainer.model.parameters()]
    del trainer, base
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_the_vectors_of_a_deleted_adapter_go_away(leaks):
    model = leaks.classifier_with_adapter()
    leaks.adapter_cycle(model, 0)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    vectors = weakref.ref(layer_of(model).learnable_embeddings["second"])
    with torch.no_grad():
        model(image_embeds=torch.randn(2, model.get_base_model().config.projection_dim))  # keeps class embeddings
    model.set_adapter("default")
    model.delete_adapter("second")
    gc.collect()
    assert vectors() is None
