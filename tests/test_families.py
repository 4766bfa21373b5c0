"""Every family of dual encoders: zero-shot, loss, gradients, every preset through its life."""

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from families import CLASS_NAMES, FAMILIES
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import BertConfig, Siglip2Model, SiglipTokenizer, Trainer, TrainingArguments

from clip_prompt_peft import (
    PRESETS,
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    template_ensemble,
)
from clip_prompt_peft.interpret import nearest_words


LABELS = torch.tensor([0, 2, 1, 3])
MERGEABLE = {"coop", "kgcoop", "prograd"}
CLOSE = {"rtol": 0, "atol": 1e-4}  # another order of additions, of logits of about ten
BOTH_WAYS = ["Siglip", "Siglip2", "ChineseCLIP", "AltCLIP"]


@functools.cache
def load_classifier(name):
    return FAMILIES[name].classifier()


class Case:
    """A family, with images for it."""

    def __init__(self, name):
        self.name, self.family = name, FAMILIES[name]
        self.images = self.family.image_inputs()

    def classifier(self):
        return copy.deepcopy(load_classifier(self.name))

    def prompted(self, preset=None, seed=0, **fields):
        """As if it had been trained."""
        classifier = self.classifier()
        torch.manual_seed(seed)
        make = CLIPPromptTuningConfig if preset is None else functools.partial(self.from_preset, preset, classifier)
        model = get_peft_model(classifier, make(**fields)).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, value in model.named_parameters():
            if "learnable_" in parameter_name:
                value.data += 0.3 * torch.randn(value.shape, generator=generator)
        return model

    @staticmethod
    def from_preset(preset, classifier, **fields):
        return CLIPPromptTuningConfig.from_preset(preset, model=classifier, **fields)

    @torch.no_grad()
    def logits(self, model):
        return model(**self.images).logits

    @torch.no_grad()
    def logits_of_family(self, model, template):
        """Those of the family's own `forward`, with texts as its processor makes them."""
        texts = self.family.texts([template.replace("{}", name) for name in CLASS_NAMES])
        return model(**self.images, **texts).logits_per_image


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


# CLIP itself: test_life_cycle_presets.py
OTHERS = [name for name in FAMILIES if name != "CLIP"]
# Of presets that put the same vectors into the same places, one; all of them with ALL_PRESETS=1 in the environment.
DIFFERENT = (
    PRESETS if os.environ.get("ALL_PRESETS") else ["coop", "coop-csc", "cocoop", "vpt-deep", "maple", "promptsrc"]
)


@pytest.fixture(params=[(name, preset) for name in OTHERS for preset in DIFFERENT], ids="-".join)
def case_and_preset(request):
    name, preset = request.param
    return Case(name), preset


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(family.save(tmp_path_factory.mktemp(name))) for name, family in FAMILIES.items()}


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

    @pytest.mark.parametrize("fields", [{}, {"class_specific": True}, {"text_prompt_depth": None}], ids=str)
    def test_gradients_are_those_of_finite_differences(self, case, fields):
        model = case.prompted(**fields).double()
        images = {name: v.double() if v.is_floating_point() else v for name, v in case.images.items()}
        vectors = [value for value in model.parameters() if value.requires_grad]
        directions = [torch.randn(v.shape, generator=torch.Generator().manual_seed(7)).double() for v in vectors]
        model(**images, labels=LABELS).loss.backward()
        expected = sum((value.grad * direction).sum() for value, direction in zip(vectors, directions))
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                for value, direction in zip(vectors, directions):
                    value += step * direction
                losses.append(model(**images, labels=LABELS).loss)
                for value, direction in zip(vectors, directions):
                    value -= step * direction
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, expected, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("preset", ["coop", "coop-csc", "cocoop", "ivlp"])
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

    def test_class_names_in_the_middle_and_in_front(self, case):
        for position in ("middle", "front"):
            model = case.prompted(num_virtual_tokens=4, class_token_position=position)
            assert not torch.allclose(case.logits(model), case.logits(case.classifier()), atol=1e-2)


class TestLife:
    def test_a_step_lowers_the_loss_and_changes_every_tensor_of_the_adapter_and_no_other(self, case_and_preset):
        case, preset = case_and_preset
        model = case.prompted(preset).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(2):
            loss = model(**case.images, labels=LABELS, return_loss_terms=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
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


class TestLoss:
    def test_sigmoid_loss_of_one_image_per_class_is_the_family_s_own(self):
        for case in map(Case, ("Siglip", "Siglip2")):
            classifier = case.classifier()
            classifier.config.classification_loss = "sigmoid"
            texts = case.family.texts([case.family.template.replace("{}", name) for name in CLASS_NAMES])
            expected = case.family.base()(**case.images, **texts, return_loss=True).loss
            actual = classifier(**case.images, labels=torch.arange(4)).loss
            torch.testing.assert_close(actual, expected)

    def test_sigmoid_loss_leaves_out_ignored_images_and_is_kept_when_saved(self, tmp_path):
        case = Case("Siglip")
        classifier = case.classifier()
        classifier.config.classification_loss = "sigmoid"
        classifier.save_pretrained(tmp_path)
        again = AutoModelForPromptClassification.from_pretrained(tmp_path).eval()
        output = again(**case.images, labels=torch.tensor([2, -100, 0, -100]))
        targets = torch.tensor([[-1.0, -1, 1, -1], [1, -1, -1, -1]])
        expected = -F.logsigmoid(targets * output.logits[[0, 2]]).sum(dim=1).mean()
        torch.testing.assert_close(output.loss, expected)

    def test_another_name_of_a_loss_is_refused(self):
        case = Case("Siglip")
        classifier = case.classifier()
        classifier.config.classification_loss = "hinge"
        with pytest.raises(ValueError, match="must be 'softmax' or 'sigmoid', got 'hinge'"):
            classifier(**case.images, labels=LABELS)

    def test_the_logit_bias_does_not_move_cross_entropy(self):
        case = Case("Siglip")
        classifier = case.classifier()
        before = classifier(**case.images, labels=LABELS)
        classifier.logit_bias.data += 3
        after = classifier(**case.images, labels=LABELS)
        torch.testing.assert_close(after.logits, before.logits + 3)
        torch.testing.assert_close(after.loss, before.loss)

    @pytest.mark.parametrize(("name", "loss"), [*((name, "softmax") for name in OTHERS), ("Siglip", "sigmoid")])
    def test_the_stock_trainer_lowers_the_loss(self, name, loss, tmp_path):
        case = Case(name)
        classifier = case.classifier()
        classifier.config.classification_loss = loss
        model = get_peft_model(classifier, CLIPPromptTuningConfig())
        examples = [{name: v[i] for name, v in case.images.items()} | {"labels": LABELS[i]} for i in range(4)]
        arguments = TrainingArguments(
            tmp_path, max_steps=6, learning_rate=0.05, report_to="none", use_cpu=True, logging_steps=1,
            disable_tqdm=True, per_device_train_batch_size=4,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert trainer.predict(examples).predictions.shape == (4, 4)

    def test_the_teacher_is_the_zero_shot_model_without_its_dropout(self):
        case = Case("AltCLIP")
        classifier = case.classifier()
        expected = classifier.get_class_embeds()
        for module in classifier.text_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model = get_peft_model(classifier, CLIPPromptTuningConfig(regularizer="kgcoop")).train()
        student = classifier.predict(classifier.get_image_features(**case.images).pooler_output, expected)
        teacher = classifier.teacher.predict(classifier, [case.family.template], student, case.images)
        torch.testing.assert_close(teacher.class_embeds, expected)
        assert all(module.training for module in model.modules())


class TestAuto:
    def test_the_class_is_picked_by_the_config(self, case, folders, tmp_path):
        model = AutoModelForPromptClassification.from_pretrained(
            folders[case.name], class_names=CLASS_NAMES, prompt_template=case.family.template
        ).eval()
        assert type(model) is case.family.classifier_class
        torch.testing.assert_close(case.logits(model), case.logits(case.classifier()), **CLOSE)
        model.save_pretrained(tmp_path)
        again = AutoModelForPromptClassification.from_pretrained(tmp_path).eval()
        assert type(again) is case.family.classifier_class and again.class_names == CLASS_NAMES
        torch.testing.assert_close(case.logits(again), case.logits(model), **CLOSE)

    def test_the_class_is_picked_for_a_model_in_memory(self, case):
        classifier = AutoModelForPromptClassification.from_base(
            case.family.base(), case.family.make_tokenizer(), CLASS_NAMES, case.family.template
        )
        assert type(classifier) is case.family.classifier_class
        assert torch.equal(case.logits(classifier), case.logits(case.classifier()))

    def test_an_adapter_alone_brings_back_the_family(self, case, folders, tmp_path):
        model = get_peft_model(
            AutoModelForPromptClassification.from_pretrained(folders[case.name], class_names=CLASS_NAMES),
            CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=3),
        ).eval()
        model.save_pretrained(tmp_path)
        for again in (
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path),
            AutoModelForPromptClassification.from_pretrained(tmp_path),
        ):
            torch.testing.assert_close(case.logits(again.eval()), case.logits(model), **CLOSE)

    def test_a_fresh_process_brings_back_every_family(self, folders, tmp_path):
        expected = {}
        for name in FAMILIES:
            case = Case(name)
            base = AutoModelForPromptClassification.from_pretrained(folders[name], class_names=CLASS_NAMES)
            model = get_peft_model(base, CLIPPromptTuningConfig.from_preset("maple", model=base)).eval()
            model.save_pretrained(tmp_path / name)
            torch.save(case.images, tmp_path / name / "images.pt")
            expected[name] = case.logits(model)
        program = (
            "import sys, json, torch, pathlib\n"
            "from clip_prompt_peft import AutoPeftModelForPromptClassification as Auto\n"
            "for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
            "    logits = Auto.from_pretrained(str(folder))(**torch.load(folder / 'images.pt')).logits\n"
            "    print('RESULT', json.dumps([folder.name, logits.tolist()]))\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=os.environ, check=False
        )
        lines = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT")]
        assert len(lines) == len(FAMILIES), run.stderr
        for name, logits in lines:
            torch.testing.assert_close(torch.tensor(logits), expected[name], **CLOSE)

    def test_other_models_are_refused_with_the_list_of_families(self, tmp_path):
        BertConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model type 'bert'.*clip \(CLIPModel\).*altclip \(AltCLIPModel\)"):
            AutoModelForPromptClassification.from_pretrained(tmp_path)
        with pytest.raises(OSError, match="from_pretrained"):
            AutoModelForPromptClassification()

    def test_a_model_of_another_family_is_refused(self, folders):
        with pytest.raises(TypeError, match="CLIPForPromptClassification is made from a CLIPModel, got a SiglipModel"):
            CLIPForPromptClassification.from_base(FAMILIES["Siglip"].base())
        with pytest.raises(ValueError, match="is not a CLIP checkpoint"):
            CLIPForPromptClassification.from_pretrained(folders["ChineseCLIP"])


class TestPatches:
    """SigLIP 2's images of any shape: patches with a mask."""

    def test_vision_prompts_are_seen_and_padding_is_not(self):
        case = Case("Siglip2")
        model = case.prompted("vpt-deep")
        expected = case.logits(model)
        case.images = {name: value.clone() for name, value in case.images.items()}
        case.images["pixel_values"][~case.images["pixel_attention_mask"].bool()] = 7.0
        torch.testing.assert_close(case.logits(model), expected, **CLOSE)

    def test_a_plain_siglip2_refuses_vision_prompts_with_the_reason(self):
        base = FAMILIES["Siglip2"].base()
        base.tokenizer = FAMILIES["Siglip2"].make_tokenizer()
        with pytest.raises(ValueError, match="Siglip2Model masks the patches.*Siglip2ForPromptClassification"):
            get_peft_model(base, CLIPPromptTuningConfig.from_preset("vpt-shallow"))
        assert type(base) is Siglip2Model

    def test_a_batch_may_mix_adapters(self):
        case = Case("Siglip2")
        model = case.prompted("ivlp")
        model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDOM"))
        by_adapter = {"__base__": case.logits(case.classifier())}
        for name in ("default", "other"):
            model.set_adapter(name)
            by_adapter[name] = case.logits(model)
        names = ["other", "default", "__base__", "other"]
        mixed = model(**case.images, adapter_names=names).logits
        torch.testing.assert_close(mixed, torch.stack([by_adapter[n][i] for i, n in enumerate(names)]), **CLOSE)


class TestSentencePiece:
    def test_siglip_s_own_tokenizer_serves(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf")
        case = Case("Siglip")
        sentences = ["a photo of a cat", "a fire truck", "an owl", "sun", "x"] * 20
        with open(tmp_path / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences), model_writer=file,
                vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
            )  # fmt: skip
        tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), model_input_names=["input_ids"])
        case.family = dataclasses.replace(case.family, make_tokenizer=lambda: tokenizer)
        classifier = case.family.classifier()
        expected = case.logits_of_family(case.family.base(), case.family.template)
        torch.testing.assert_close(case.logits(classifier), expected, **CLOSE)
        model = get_peft_model(classifier, CLIPPromptTuningConfig()).eval()
        torch.testing.assert_close(case.logits(model), expected, **CLOSE)
        with pytest.raises(ValueError, match="SiglipTokenizer does not tell .* class_token_count='alone'"):
            get_peft_model(case.family.classifier(), CLIPPromptTuningConfig(class_token_position="front"))(
                **case.images
            )
        alone = CLIPPromptTuningConfig(class_token_position="front", class_token_count="alone")
        assert case.logits(get_peft_model(case.family.classifier(), alone)).shape == (4, 4)


class TestWords:
    def test_the_words_next_to_untrained_vectors_are_those_replaced(self, case):
        model = get_peft_model(case.classifier(), CLIPPromptTuningConfig())
        entries = nearest_words(model, num_words=1)
        assert [entry.words[0] for entry in entries] == [entry.replaced for entry in entries]
        assert [entry.position for entry in entries] == list(
            range(entries[0].position, entries[0].position + len(entries))
        )
