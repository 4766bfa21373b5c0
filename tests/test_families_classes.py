"""Every family of dual encoders: its loss, its class, its tokenizer, and images as patches."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from families import CLASS_NAMES, FAMILIES, Case, takes
from peft import get_peft_model
from torch.nn import functional as F
from transformers import BertConfig, Siglip2Model, SiglipTokenizer, Trainer, TrainingArguments

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)


LABELS = torch.tensor([0, 2, 1, 3])
CLOSE = {"rtol": 0, "atol": 1e-4}  # another order of additions, of logits of about ten


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(family.save(tmp_path_factory.mktemp(name))) for name, family in FAMILIES.items()}


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

    @pytest.mark.parametrize(
        ("name", "loss"),
        [
            *(pytest.param(name, "softmax", marks=pytest.mark.slow) for name in FAMILIES if name != "CLIP"),
            ("Siglip", "sigmoid"),
        ],
    )
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

    @pytest.mark.slow
    def test_a_fresh_process_brings_back_every_family(self, folders, tmp_path):
        expected = {}
        for name in FAMILIES:
            case = Case(name)
            base = AutoModelForPromptClassification.from_pretrained(folders[name], class_names=CLASS_NAMES)
            preset = "maple" if takes(name, "maple") else "vpt-shallow"
            model = get_peft_model(base, CLIPPromptTuningConfig.from_preset(preset, model=base)).eval()
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

    def test_an_adapter_that_names_no_base_model_is_refused(self, tmp_path):
        Case("Siglip").prompted().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="does not name its base model"):
            AutoModelForPromptClassification.from_pretrained(tmp_path)

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

    def test_patches_without_their_mask_are_refused(self):
        case = Case("Siglip2")
        with pytest.raises(ValueError, match="need pixel_attention_mask and spatial_shapes"):
            case.classifier()(pixel_values=case.images["pixel_values"])

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
