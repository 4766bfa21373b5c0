"""Families with towers of their own kind: AIMv2's causal masks and scale, GroupViT's batch norms and stages."""

import dataclasses

import pytest
import torch
from adapters import as_if_trained
from families import CLASS_NAMES, FAMILIES, VISION, Case
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.export import BakedClassifier


CLOSE = {"rtol": 0, "atol": 1e-5}
LABELS = torch.tensor([0, 2, 1, 3])
DEEPLY = {"text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}


def aimv2(attention="sdpa", **vision):
    """With another attention or image tower."""
    family = dataclasses.replace(FAMILIES["Aimv2"], vision={**VISION, **vision})
    classifier = family.classifier()
    classifier.set_attn_implementation(attention)
    return classifier


class TestAimv2Texts:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("path", ["plain", "cut", "packed"])
    def test_a_class_has_the_same_embedding_alone_and_beside_longer_ones(self, attention, path):
        classifier = aimv2(attention)
        classifier.class_encoder.path = path
        with torch.no_grad():
            together = classifier.get_class_embeds()
            for index, name in enumerate(CLASS_NAMES):
                classifier.set_class_names([name])
                torch.testing.assert_close(classifier.get_class_embeds()[0], together[index], **CLOSE)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_class_embeddings_are_those_of_the_family_with_padding_in_the_batch(self, attention):
        classifier, base = aimv2(attention), FAMILIES["Aimv2"].base()
        base.set_attn_implementation(attention)
        texts = FAMILIES["Aimv2"].texts([f"a photo of a {name}." for name in CLASS_NAMES])
        assert not texts["attention_mask"].all()
        with torch.no_grad():
            expected = base.get_text_features(**texts).pooler_output
            embeds = classifier.get_class_embeds()
        torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1), **CLOSE)

    def test_texts_that_the_family_reads_in_both_directions_are_read_causally(self):
        classifier, base = aimv2(), FAMILIES["Aimv2"].base()
        texts = FAMILIES["Aimv2"].texts(["a photo of a cat."])  # without padding
        longer = FAMILIES["Aimv2"].texts(["a photo of a cat.", "a photo of a fire truck."])
        images = FAMILIES["Aimv2"].image_inputs()
        with torch.no_grad():
            causal = base.get_text_features(**longer).pooler_output[:1]
            assert not torch.allclose(base.get_text_features(**texts).pooler_output, causal, atol=1e-2)  # transformers
            for mask in ({}, {"attention_mask": texts["attention_mask"]}):
                embeds = classifier.get_text_features(input_ids=texts["input_ids"], **mask).pooler_output
                torch.testing.assert_close(embeds, causal, **CLOSE)
            expected = base(**longer, **images).logits_per_image[:, :1]
            torch.testing.assert_close(classifier(**texts, **images).logits_per_image, expected, rtol=0, atol=1e-4)

    def test_attention_that_takes_no_mask_is_refused(self):
        classifier = aimv2()
        classifier.text_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*takes no causal mask.*'sdpa'"):
            classifier.get_class_embeds()


class TestAimv2Images:
    def test_the_scale_is_limited_as_the_family_limits_it(self):
        case = Case("Aimv2")
        classifier, base = case.family.classifier(), case.family.base()
        for model in (classifier, base):
            model.logit_scale.data.fill_(6.0)  # exp(6) is 403, and the limit is 100
        expected = case.logits_of_family(base, case.family.template)
        torch.testing.assert_close(case.logits(classifier), expected, rtol=1e-5, atol=1e-3)
        baked = BakedClassifier(classifier, classifier.get_class_embeds().detach(), classifier.class_head)
        torch.testing.assert_close(baked.scale, torch.tensor(100.0))

    def test_a_tower_of_native_resolution_takes_images_of_other_sizes_and_prompts(self):
        classifier = aimv2(is_native=True)
        assert not hasattr(classifier.vision_model.embeddings, "position_embedding")
        model = as_if_trained(
            get_peft_model(classifier, CLIPPromptTuningConfig(num_virtual_tokens=2, **DEEPLY)).eval()
        )
        for height, width in ((24, 24), (16, 40)):
            images = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(3))
            model.zero_grad()
            model(pixel_values=images, labels=LABELS).loss.backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert len(trained) == 4 and all(p.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in trained)


class TestGroupViT:
    def test_in_training_it_computes_the_same_and_its_statistics_stay(self):
        case = Case("GroupViT")
        model = get_peft_model(case.classifier(), CLIPPromptTuningConfig())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(case.logits(model.train()), case.logits(case.classifier()), rtol=0, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        still = [name for name, module in model.named_modules() if not module.training]
        assert len(still) == 4 and all(name.endswith((".assign", "projection.1")) for name in still)

    def test_chunks_of_classes_have_the_embeddings_of_all_at_once_in_training(self):
        case = Case("GroupViT")
        results = []
        for size in (None, 1):
            model = case.prompted("coop").train()
            model.get_base_model().class_encoder.batch_size = size
            loss = model(**case.images, labels=LABELS).loss
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fields", [{}, {"vision_prompts_from_text": True}], ids=str)
    def test_vision_prompts_are_put_beside_the_patches_and_trained(self, fields, tmp_path):
        case = Case("GroupViT")
        model = case.prompted(num_virtual_tokens=2, num_vision_virtual_tokens=2, vision_prompt_depth=1, **fields)
        assert not torch.allclose(case.logits(model), case.logits(case.classifier()), atol=1e-2)
        model.train()(**case.images, labels=LABELS).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)

    def test_images_of_another_size_are_refused(self):
        case = Case("GroupViT")
        with pytest.raises(ValueError, match="images of one size, without interpolation"):
            case.classifier()(**case.images, interpolate_pos_encoding=True)
