"""Every family of dual encoders: zero-shot, gradients, every preset through its life."""

import os

import pytest
import torch
from adapters import train_with_sgd
from conftest import slow_param
from families import CLASS_NAMES, DEEP_VISION, FAMILIES, Case, takes
from peft import PeftModel, get_peft_model

from clip_prompt_peft import PRESETS, CLIPPromptTuningConfig, template_ensemble
from clip_prompt_peft.evaluation.interpret import nearest_words


LABELS = torch.tensor([0, 2, 1, 3])
MERGEABLE = {"coop", "kgcoop", "prograd"}
CLOSE = {"rtol": 0, "atol": 1e-4}  # another order of additions, of logits of about ten
BOTH_WAYS = ["Siglip", "Siglip2", "ChineseCLIP", "AltCLIP"]


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


# CLIP itself: test_life_cycle_presets.py
OTHERS = [name for name in FAMILIES if name != "CLIP"]
# Of presets that put the same vectors into the same places, one; all of them with ALL_PRESETS=1 in the environment.
DIFFERENT = (
    PRESETS if os.environ.get("ALL_PRESETS") else ["coop", "coop-csc", "cocoop", "vpt-deep", "maple", "promptsrc"]
)


PAIRS = [(name, preset) for name in OTHERS for preset in DIFFERENT if takes(name, preset)]


def is_in_a_quick_run(name, preset):
    return name == "Siglip" or preset == "maple"


@pytest.fixture(params=[pair if is_in_a_quick_run(*pair) else slow_param(pair) for pair in PAIRS], ids="-".join)
def case_and_preset(request):
    name, preset = request.param
    return Case(name), preset


class TestZeroShot:
    def test_logits_are_those_of_the_family(self, case):
        expected = case.logits_of_family(case.family.base(), case.family.template)
        torch.testing.assert_close(case.logits(case.classifier()), expected, **CLOSE)
        assert expected.std(dim=0).min() > 0.01  # images are told apart

    def test_classes_of_very_different_lengths_do_not_disturb_each_other(self, case):
        together, alone = case.classifier(), case.classifier()
        together.set_class_names(["cat", "fire truck of an owl of a sun of art"])
        alone.set_class_names(["cat"])
        torch.testing.assert_close(case.logits(together)[:, :1], case.logits(alone), **CLOSE)

    def test_with_texts_it_is_the_family_s_own_model_loss_included(self, case):
        texts = case.family.texts([f"a photo of {name}" for name in CLASS_NAMES])
        expected, actual = (
            model(**case.images, **texts, return_loss=True) for model in (case.family.base(), case.classifier())
        )
        assert torch.equal(actual.logits_per_image, expected.logits_per_image)
        if case.name == "Aimv2":  # it computes none
            assert actual.loss is expected.loss is None
        else:
            assert torch.equal(actual.loss, expected.loss)

    def test_modules_are_shared_with_the_family_s_model_on_the_way_there_and_back(self, case):
        base = case.family.base()
        classifier = case.family.classifier_class.from_base(base, case.family.make_tokenizer(), CLASS_NAMES)
        again = classifier.to_base()
        assert type(again) is case.family.base_class
        assert all(a is b for a, b in zip(base.parameters(), again.parameters(), strict=True))

    def test_an_ensemble_of_one_template_is_that_template(self, case):
        classifier = case.classifier()
        embeds = template_ensemble(classifier, [case.family.template])
        torch.testing.assert_close(embeds, classifier.get_class_embeds(), rtol=0, atol=1e-6)

    def test_special_tokens_in_names_are_refused_and_unknown_words_are_not(self, case):
        classifier = case.classifier()
        with pytest.raises(ValueError, match="special tokens"):
            classifier.set_class_names(["cat", classifier.tokenizer.eos_token or classifier.tokenizer.sep_token])
        if classifier.tokenizer.unk_token != classifier.tokenizer.eos_token:
            classifier.set_class_names(["cat", "ßß"])
            assert case.logits(classifier).shape == (4, 2)

    def test_a_name_that_does_not_fit_is_refused_by_name(self, case):
        with pytest.raises(ValueError, match="class name 'cat( cat)*' .* (64|62) positions"):
            case.classifier().set_class_names(["owl", " ".join(["cat"] * 70)])


class TestPrompts:
    def test_untrained_the_default_adapter_is_the_zero_shot_model(self, case):
        model = get_peft_model(case.classifier(), CLIPPromptTuningConfig()).eval()
        assert torch.equal(case.logits(model), case.logits(case.classifier()))
        first = 0 if case.name.startswith("Siglip") else 1
        assert model.active_peft_config.start_idx == first

    def test_without_an_attention_mask_positions_are_those_of_the_family_too(self, case):
        texts = case.family.texts(["a photo of a cat.", "a photo of a fire truck of a sun."])
        texts.pop("attention_mask", None)
        base = case.family.base()
        expected = base.get_text_features(**texts).pooler_output
        base.tokenizer = case.family.make_tokenizer()
        model = get_peft_model(base, CLIPPromptTuningConfig(prompt_template="a photo of a {}."))
        torch.testing.assert_close(model.get_text_features(**texts).pooler_output, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("fields", [{}, {"text_prompt_depth": None}], ids=str)
    def test_gradients_are_those_of_finite_differences(self, case, fields):
        model = case.prompted(**fields).double()
        images = {name: v.double() if v.is_floating_point() else v for name, v in case.images.items()}
        vectors = [value for value in model.parameters() if value.requires_grad]
        directions = [torch.randn(v.shape, generator=torch.Generator().manual_seed(7)).double() for v in vectors]
        # The norms of AIMv2 compute in float32, so that small differences drown in rounding.
        size, close = (
            (3e-3, {"rtol": 1e-2, "atol": 1e-3}) if case.name == "Aimv2" else (1e-5, {"rtol": 1e-5, "atol": 1e-8})
        )
        model(**images, labels=LABELS).loss.backward()
        expected = sum((value.grad * direction).sum() for value, direction in zip(vectors, directions))
        losses = []
        for step in (size, -size):
            with torch.no_grad():
                for value, direction in zip(vectors, directions):
                    value += step * direction
                losses.append(model(**images, labels=LABELS).loss)
                for value, direction in zip(vectors, directions):
                    value -= step * direction
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * size), expected, **close)

    @pytest.mark.parametrize("preset", ["coop", "coop-csc", "cocoop"])
    def test_the_automatic_path_and_chunks_give_values_and_gradients_of_the_plain_one(self, case, preset):
        results = []
        for path, batch_size in (("plain", None), ("auto", None), ("auto", 3)):
            model = case.prompted(preset)
            encoder = model.get_base_model().class_encoder
            encoder.path, encoder.batch_size = path, batch_size
            loss = model(**case.images, labels=LABELS).loss
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", BOTH_WAYS)
    def test_a_tower_that_attends_both_ways_is_not_packed(self, name):
        classifier = Case(name).classifier()
        classifier.class_encoder.path = "packed"
        with pytest.raises(ValueError, match="would not give this model's embeddings"):
            classifier.get_class_embeds()

    @pytest.mark.parametrize("preset", DEEP_VISION)
    def test_deep_vision_prompts_are_refused_where_patches_are_grouped_in_stages(self, preset):
        case = Case("GroupViT")
        with pytest.raises(ValueError, match=r"vision_prompt_depth=3 .* stages, .* take vision_prompt_depth=1"):
            case.prompted(preset)
        assert torch.equal(case.logits(case.classifier()), case.logits(case.family.classifier()))

    def test_class_names_in_the_middle_and_in_front(self, case):
        for position in ("middle", "front"):
            model = case.prompted(num_virtual_tokens=4, class_token_position=position)
            assert not torch.allclose(case.logits(model), case.logits(case.classifier()), atol=1e-2)


class TestLife:
    def test_a_step_lowers_the_loss_and_changes_every_tensor_of_the_adapter_and_no_other(self, case_and_preset):
        case, preset = case_and_preset
        model = case.prompted(preset).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        inputs = {**case.images, "labels": LABELS, "return_loss_terms": True}
        losses = train_with_sgd(model, inputs, lr=1e-3, num_steps=2)
        assert losses[1] < losses[0]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if ".learnable_" in name}

    def test_it_is_saved_loaded_switched_disabled_deleted_and_unloaded(self, case_and_preset, tmp_path):
        case, preset = case_and_preset
        zero_shot = case.logits(case.classifier())
        model = case.prompted(preset)
        expected = case.logits(model)
        assert not torch.allclose(expected, zero_shot, atol=1e-2)

        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.classifier(), tmp_path).eval()
        torch.testing.assert_close(case.logits(loaded), expected, **CLOSE)

        model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2))
        model.set_adapter("other")
        assert torch.equal(case.logits(model), zero_shot)
        model.set_adapter("default")
        assert torch.equal(case.logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(case.logits(model), zero_shot)
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(case.logits(model), zero_shot)
        base = loaded.unload()
        assert torch.equal(case.logits(base), zero_shot)
        assert base.state_dict().keys() == case.classifier().state_dict().keys()

    def test_it_is_folded_into_the_family_s_plain_model_or_refuses(self, case_and_preset):
        case, preset = case_and_preset
        model = case.prompted(preset)
        expected, template = case.logits(model), model.active_peft_config.padded_template
        if preset not in MERGEABLE:
            with pytest.raises(ValueError, match="Adapter 'default' cannot be merged: it"):
                model.merge_and_unload()
            assert torch.equal(case.logits(model), expected)
            return
        model.merge_adapter()
        torch.testing.assert_close(case.logits(model), expected, **CLOSE)
        model.unmerge_adapter()
        assert torch.equal(case.logits(model), expected)
        plain = model.merge_and_unload().to_base()
        assert type(plain) is case.family.base_class
        torch.testing.assert_close(case.logits_of_family(plain, template), expected, **CLOSE)


class TestWords:
    def test_the_words_next_to_untrained_vectors_are_those_replaced(self, case):
        model = get_peft_model(case.classifier(), CLIPPromptTuningConfig())
        entries = nearest_words(model, num_words=1)
        assert [entry.words[0] for entry in entries] == [entry.replaced for entry in entries]
        assert [entry.position for entry in entries] == list(
            range(entries[0].position, entries[0].position + len(entries))
        )
