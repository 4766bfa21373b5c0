"""Class embeddings from several texts per class."""

import pytest
import torch
from adapters import tuned
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import (
    ClassHeadConfig,
    CLIPForPromptClassification,
    description_ensemble,
    load_templates,
    template_ensemble,
)


TEMPLATES = ["a photo of a {}.", "an icon of a {}.", "{}"]


def mean_of_plain_clip(clip, tokenizer, texts):
    """Computes the ensemble with a plain CLIPModel, one text at a time."""
    with torch.no_grad():
        embeds = [clip.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0] for text in texts]
    mean = torch.stack([embed / embed.norm() for embed in embeds]).mean(dim=0)
    return mean / mean.norm()


def test_templates_are_averaged_as_clip_does(classifier, clip, tokenizer):
    embeds = template_ensemble(classifier, TEMPLATES)
    for name, embed in zip(CLASS_NAMES, embeds):
        expected = mean_of_plain_clip(clip, tokenizer, [template.format(name) for template in TEMPLATES])
        torch.testing.assert_close(embed, expected, rtol=1e-5, atol=1e-6)


def test_one_template_is_the_zero_shot_classifier(classifier):
    torch.testing.assert_close(template_ensemble(classifier, ["a photo of a {}."]), classifier.get_class_embeds())


def test_descriptions_of_different_number_are_averaged(classifier, clip, tokenizer):
    texts = {name: [f"{name} number {i}" for i in range(1 + index)] for index, name in enumerate(CLASS_NAMES)}
    embeds = description_ensemble(classifier, dict(reversed(texts.items())))
    for name, embed in zip(CLASS_NAMES, embeds):
        torch.testing.assert_close(embed, mean_of_plain_clip(clip, tokenizer, texts[name]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_classifier_scores_with_an_ensemble_until_its_classes_change(classifier, pixel_values):
    zero_shot = classifier(pixel_values=pixel_values).logits
    embeds = template_ensemble(classifier, TEMPLATES)
    classifier.set_class_embeds(3 * embeds)  # need not be normalized
    image_embeds = classifier.get_image_features(pixel_values).pooler_output
    image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
    ensemble = classifier(pixel_values=pixel_values).logits
    torch.testing.assert_close(ensemble, classifier.logit_scale.exp() * image_embeds @ embeds.T)
    assert not torch.allclose(ensemble, zero_shot)
    classifier.set_class_names(CLASS_NAMES)
    torch.testing.assert_close(classifier(pixel_values=pixel_values).logits, zero_shot)
    classifier.set_class_embeds(embeds)
    classifier.set_class_embeds(None)
    torch.testing.assert_close(classifier(pixel_values=pixel_values).logits, zero_shot)


@torch.no_grad()
def test_an_active_prompt_adapter_keeps_its_prompts_and_shows_the_ensemble_when_disabled(classifier, pixel_values):
    classifier.set_class_embeds(template_ensemble(classifier, TEMPLATES))
    ensemble = classifier(pixel_values=pixel_values).logits
    model = tuned(classifier)
    assert not torch.allclose(model(pixel_values=pixel_values).logits, ensemble)
    with model.disable_adapter():
        torch.testing.assert_close(model(pixel_values=pixel_values).logits, ensemble)


def test_an_ensemble_with_learned_vectors_in_every_text_is_refused(classifier):
    model = tuned(classifier)
    with pytest.raises(ValueError, match="disable_adapter"):
        template_ensemble(model, TEMPLATES)
    with model.disable_adapter():
        assert template_ensemble(model, TEMPLATES).shape == (4, 128)


def test_an_ensemble_behind_a_class_head_is_refused(classifier):
    model = get_peft_model(classifier, ClassHeadConfig())
    with pytest.raises(ValueError, match="class head is active.*disable_adapter"):
        template_ensemble(classifier, TEMPLATES)
    with model.disable_adapter():
        assert template_ensemble(classifier, TEMPLATES).shape == (4, 128)


def test_other_adapters_count(classifier):
    before = template_ensemble(classifier, TEMPLATES)
    model = get_peft_model(classifier, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.allclose(template_ensemble(model, TEMPLATES), before)


def test_imagenet_templates_are_there():
    templates = load_templates("imagenet")
    assert len(set(templates)) == 80
    assert set(load_templates("imagenet_simple")) < set(templates)
    assert all(template.count("{}") == 1 for template in templates)
    with pytest.raises(ValueError, match="'cifar'.*imagenet, imagenet_simple"):
        load_templates("cifar")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: template_ensemble(model, []), "list of texts"),
        (lambda model: template_ensemble(model, "a {}"), "list of texts"),
        (lambda model: template_ensemble(model, ["a {}", "no slot"]), "'no slot' holds {} 0 times"),
        (
            lambda model: template_ensemble(model, ["so " * 80 + "{}"]),
            "about 'animal' has 163 tokens.* 77 positions",
        ),
        (lambda model: description_ensemble(model, {"animal": ["cat"]}), "3 classes have none.*'plant'"),
        (lambda model: description_ensemble(model, {n: ["x"] for n in [*CLASS_NAMES, "fish"]}), "no classes.*'fish'"),
        (lambda model: description_ensemble(model, dict.fromkeys(CLASS_NAMES, "text")), "list of texts, got 'text'"),
        (lambda model: model.set_class_embeds(torch.ones(3, 128)), r"\(4, 128\).*got \(3, 128\)"),
    ],
)
def test_mistakes_are_told(classifier, make, message):
    with pytest.raises(ValueError, match=message):
        make(classifier)


def test_a_classifier_without_classes_is_told_so():
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    with pytest.raises(ValueError, match="set_class_names"):
        template_ensemble(model, TEMPLATES)
