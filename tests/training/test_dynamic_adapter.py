"""TDA's caches over a stream of images."""

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from torch.testing import assert_close

from clip_prompt_peft import CLIPPromptTuningConfig, DynamicAdapter, TestTimeTuner


CLASSES = torch.eye(3)


def stream(number=40, width=3, seed=0):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def test_an_image_that_was_seen_raises_the_logit_of_its_class():
    """By hand: a certain image puts itself into the positive cache, at distance 0, with weight 2."""
    adapter = DynamicAdapter(CLASSES)
    assert_close(adapter(torch.tensor([[1.0, 0.0, 0.0]])).logits, torch.tensor([[102.0, 0.0, 0.0]]))
    logits = adapter(torch.tensor([[0.6, 0.8, 0.0]])).logits  # 2 exp(-5 (1 - 0.6)) from the first image
    assert_close(logits, torch.tensor([[60 + 2 * 0.1353353, 82.0, 0.0]]))


def test_an_image_of_medium_certainty_counts_against_its_probable_classes():
    adapter = DynamicAdapter(CLASSES, logit_scale=10.0, positive_weight=0.0)
    image = torch.tensor([[0.6, 0.68, 0.0]])
    image = image / image.norm()
    probabilities = (10 * image).softmax(dim=-1)
    relative = float(torch.special.entr(probabilities).sum()) / torch.log2(torch.tensor(3.0))
    assert 0.2 < relative < 0.5 and (probabilities[0] > 0.03).tolist() == [True, True, False]
    assert_close(adapter(image).logits, 10 * image - torch.tensor([[0.117, 0.117, 0.0]]))


def test_answers_depend_on_the_stream_but_not_on_its_batches():
    images = stream()
    whole, parts = DynamicAdapter(CLASSES, 5.0), DynamicAdapter(CLASSES, 5.0)
    expected = whole(images).logits
    assert_close(torch.cat([parts(part).logits for part in images.split([1, 30, 9])]), expected)
    assert whole.num_images == parts.num_images == 40
    assert not torch.allclose(whole(images).logits, expected)
    whole.reset()
    assert whole.num_images == 0
    assert_close(whole(images).logits, expected)
    assert not torch.allclose(DynamicAdapter(CLASSES, 5.0)(images.flip(0)).logits.flip(0), expected)


def test_caches_are_bounded_and_hold_the_most_certain_images():
    adapter = DynamicAdapter(CLASSES, 5.0)
    adapter(stream(300))
    for cache, size in ((adapter.positive, 3), (adapter.negative, 2)):
        assert all(len(items) <= size for items in cache.items.values())
        for items in cache.items.values():
            entropies = [entropy for entropy, *_ in items]
            assert entropies == sorted(entropies)


def test_one_view_of_each_image_is_kept_of_ten():
    views = stream(5 * 10).view(5, 10, 3)
    found = DynamicAdapter(CLASSES, 5.0)(views).logits
    logits = 5 * torch.nn.functional.normalize(views, dim=-1)
    best = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).argmin(dim=1)
    chosen = torch.stack([of_image[index] for of_image, index in zip(views, best)])
    assert_close(found, DynamicAdapter(CLASSES, 5.0)(chosen).logits)


def test_a_classifier_gives_its_classes_and_scale(classifier, pixel_values):
    with torch.inference_mode():
        expected = classifier(pixel_values=pixel_values).logits
        embeds = classifier.get_image_features(pixel_values).pooler_output
        adapter = DynamicAdapter.of(classifier, positive_weight=0.0, negative_weight=0.0)
        logits = adapter(embeds).logits
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not adapter.class_embeds.is_inference()


def test_a_scale_has_the_bound_of_its_family():
    classifier = FAMILIES["Aimv2"].classifier().eval()
    classifier.logit_scale.data.fill_(6.0)  # above the logarithm of 100
    embeds = torch.randn(3, classifier.embed_width)
    expected = classifier(image_embeds=embeds).logits
    adapter = DynamicAdapter.of(classifier, positive_weight=0.0, negative_weight=0.0)
    assert_close(adapter(embeds).logits, expected, atol=1e-4, rtol=1e-4)
    tuner = TestTimeTuner(classifier, selection=1.0, learning_rate=1e-12)
    assert_close(tuner(image_embeds=embeds[:, None]).logits, expected, atol=1e-3, rtol=1e-3)


def test_a_classifier_in_place_of_class_embeddings_is_told(classifier):
    with pytest.raises(TypeError, match=r"got a CLIPForPromptClassification; DynamicAdapter\.of\(model\)"):
        DynamicAdapter(classifier)


def test_classifiers_without_fixed_classes_are_refused(classifier, clip):
    with pytest.raises(TypeError, match="needs a classifier"):
        DynamicAdapter.of(clip)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        DynamicAdapter.of(classifier.train())
    model = get_peft_model(classifier, CLIPPromptTuningConfig.from_preset("cocoop")).eval()
    with pytest.raises(ValueError, match="for each image"):
        DynamicAdapter.of(model)


def test_several_labels_for_an_image_are_refused(classifier):
    classifier.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="exactly one label"):
        DynamicAdapter.of(classifier)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(2, 4), r"must be \(B, 3\).*got \(2, 4\)"),
        (torch.ones(3), r"got \(3,\)"),
        (torch.ones(0, 3), r"got \(0, 3\)"),
        (torch.ones(2, 9, 3), "selection=0.1 keeps none; give at least 10"),
        (torch.tensor([[1.0, float("nan"), 0.0]]), "NaN"),
    ],
)
def test_bad_images_are_refused_and_leave_the_caches_alone(images, message):
    adapter = DynamicAdapter(CLASSES)
    adapter(stream(4))
    with pytest.raises(ValueError, match=message):
        adapter(images)
    assert adapter.num_images == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_embeds": torch.ones(3)}, r"must be \(C, E\)"),
        ({"class_embeds": torch.full((2, 3), float("inf"))}, "finite"),
        ({"positive_size": 0}, "positive_size must be an integer of at least 1, got 0"),
        ({"negative_size": -1}, "negative_size must be an integer of at least 0, got -1"),
        ({"selection": 2.0}, "got 2.0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicAdapter(**{"class_embeds": CLASSES, **arguments})


def test_one_class_is_always_the_answer():
    logits = DynamicAdapter(torch.ones(1, 3))(stream(5)).logits
    assert logits.shape == (5, 1) and torch.isfinite(logits).all()
