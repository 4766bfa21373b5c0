"""Every method of the family against numbers that its authors' code computed: logits, losses and all gradients.

The small CLIP of these numbers has 4 text layers of width 128 and 5 image layers of width 64, so a width or a depth
taken from the wrong tower shows.
"""

import re

import pytest
import torch
from conftest import GoldenCase
from peft import get_peft_model
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from clip_prompt_peft import (
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    GaussianPromptAveraging,
    ProGradTrainer,
    build_class_prompts,
)
from clip_prompt_peft.regularizers import PromptSRCRegularizer
from clip_prompt_peft.regularizers.promptsrc import mean_distance, mean_divergence
from clip_prompt_peft.text import normalize


TEXT, VISION = "text_model.embeddings", "vision_model.embeddings"


def coop(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "class_specific": settings.get("csc", False),
        "class_token_position": settings["class_token_position"],
        "class_token_count": "alone",
    }


def cocoop(settings):
    return {"num_virtual_tokens": settings["n_ctx"], "image_conditioned": True}


def maple(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "num_vision_virtual_tokens": settings["n_ctx"],
        "text_prompt_depth": settings["prompt_depth"],
        "vision_prompt_depth": settings["prompt_depth"],
        "vision_prompts_from_text": True,
    }


def ivlp(settings):
    vision = {
        "num_vision_virtual_tokens": settings["n_ctx_vision"],
        "vision_prompt_depth": settings["depth_vision"],
    }
    return {
        "num_virtual_tokens": settings["n_ctx_text"],
        "text_prompt_depth": settings["depth_text"],
        **(vision if settings["depth_vision"] else {}),
    }


def vpt(settings):
    return {
        "num_virtual_tokens": 0,
        "num_vision_virtual_tokens": settings["n_ctx_vision"],
        "vision_prompt_depth": settings["depth_vision"],
    }


def kgcoop(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "regularizer": "kgcoop",
        "regularizer_weights": {"weight": settings["w"]},
        "teacher_templates": [settings["teacher_template"]],
    }


def prograd(settings):
    return {
        "num_virtual_tokens": settings["n_ctx"],
        "regularizer": "prograd",
        "regularizer_weights": {"projection": settings["lambda_"], "temperature": settings["T"]},
        "teacher_templates": [settings["teacher_template"]],
    }


def promptsrc(settings):
    weights = {"text": settings["text_loss_weight"], "image": settings["image_loss_weight"]}
    return {**ivlp(settings), "regularizer": "promptsrc", "regularizer_weights": weights}


FIELDS = {
    "coop": coop,
    "cocoop": cocoop,
    "maple": maple,
    "ivlp": ivlp,
    "vpt": vpt,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "promptsrc": promptsrc,
}


def our_name(name):
    """Where one of the authors' tensors lives here, as the end of a parameter's name."""
    if name == "ctx":
        return f"{TEXT}.learnable_embeddings.default"
    if name == "image_encoder.VPT":
        return f"{VISION}.learnable_prompts.default"
    if meta_net := re.fullmatch(r"meta_net\.linear(\d)\.(\w+)", name):
        return f"{TEXT}.learnable_meta_{'in' if meta_net[1] == '1' else 'out'}.default.{meta_net[2]}"
    if name.startswith("proj."):
        return f"{VISION}.learnable_projections.default.{name.removeprefix('proj.')}"
    if deep := re.fullmatch(r"compound_prompts_text\.(\d+)", name):
        return f"text_model.encoder.layers.{int(deep[1]) + 1}.learnable_prompts.default"
    if deep := re.fullmatch(r"compound_prompt_projections\.(\d+)\.(\w+)", name):
        return f"vision_model.encoder.layers.{int(deep[1]) + 1}.learnable_projections.default.{deep[2]}"
    tower, layer = re.fullmatch(r"(text|image)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", name).groups()
    tower = {"text": "text_model", "image": "vision_model"}[tower]
    return f"{tower}.encoder.layers.{layer}.learnable_prompts.default"


def prompted_model(base, case, **fields):
    """The classifier of a case, with the authors' tensors in it."""
    settings, info = case.info["settings"], case.info
    # "X X cat." is written by a template without words, "a photo of a cat." by one with
    template = "a photo of a {}." if info["prompts"][0].startswith("a photo of a ") else "{}."
    classifier = CLIPForPromptClassification.from_pretrained(base, class_names=info["classnames"])
    method = FIELDS[info["method"].removesuffix("_gpa")]
    config = CLIPPromptTuningConfig(prompt_template=template, **{**method(settings), **fields})
    model = get_peft_model(classifier, config).train()
    load(model, case, "param." if any(name.startswith("param.") for name in case.tensors) else "initial.")
    return model


def tensors_of(model):
    return {name: value for name, value in model.named_parameters() if "learnable_" in name}


def load(model, case, prefix):
    values = {our_name(key.removeprefix(prefix)): case[key] for key in case.tensors if key.startswith(prefix)}
    tensors = tensors_of(model)
    assert len(values) == len(tensors)
    for name, parameter in tensors.items():
        value = values[name.removeprefix("base_model.model.")]
        assert parameter.shape == value.shape
        parameter.data.copy_(value)


def assert_near(found, expected, atol):
    assert_close(found.detach(), expected, atol=atol, rtol=0)


def assert_gradient(parameter, expected, tolerance):
    assert_near(parameter.grad, expected, atol=tolerance * float(expected.abs().max()))


def assert_gradients(model, case):
    tensors = tensors_of(model)
    gradients = [key for key in case.tensors if key.startswith("grad.")]
    assert len(gradients) == len(tensors)
    for key in gradients:
        parameter = tensors[f"base_model.model.{our_name(key.removeprefix('grad.'))}"]
        assert_gradient(parameter, case[key], case.info["tolerances"]["grad_max_abs_over_absmax"])


FORWARD_CASES = [
    "coop_csc_end_n4",
    "coop_csc_front_n16",
    "coop_csc_middle_n4",
    "coop_shared_front_n4",
    "coop_shared_front_punctuation",
    "coop_shared_middle_n4",
    "cocoop_ctxinit",
    "cocoop_n4",
    "ivlp_deep_ctxinit",
    "ivlp_deep_t3_v4",
    "ivlp_shallow",
    "ivlp_text_only_deep_t4_v0",
    "kgcoop_ctxinit_w8",
    "kgcoop_random_n4_w1",
    "maple_ctxinit_n2_depth3",
    "maple_n2_depth3",
    "maple_n4_depth1_shallow",
    "promptsrc_ctxinit",
    "promptsrc_random_n2",
    "vpt_deep_n3_d5",
    "vpt_shallow_n4",
]


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_loss_and_every_gradient_are_the_authors(name, golden_base):
    case = GoldenCase(name)
    model = prompted_model(golden_base, case)
    outputs = model(pixel_values=case.pixel_values, labels=case.labels, return_loss_terms=True)
    outputs.loss.backward()
    tolerances = case.info["tolerances"]
    assert_near(outputs.logits, case["logits"], tolerances["logits_atol"])
    assert_near(outputs.loss, case["loss"], tolerances["loss_atol"])
    assert_near(outputs.loss_terms["cross_entropy"], case["ce_loss"], tolerances["loss_atol"])
    classifier, atol = model.get_base_model(), tolerances["features_atol"]
    image_embeds = classifier.get_image_features(case.pixel_values).pooler_output
    assert_near(classifier.get_class_embeds(image_embeds), case["text_features_norm"], atol)
    assert_near(normalize(image_embeds), case["image_features_norm"], atol)
    assert_gradients(model, case)
    with torch.no_grad():
        assert_near(model.eval()(pixel_values=case.pixel_values).logits, case["logits"], tolerances["logits_atol"])


@pytest.mark.parametrize("name", [name for name in FORWARD_CASES if name.startswith("coop_")])
def test_class_names_stand_among_the_vectors_as_in_the_authors_prompts(name, golden_base):
    case = GoldenCase(name)
    model = prompted_model(golden_base, case).get_base_model()
    prompts = build_class_prompts(model.class_names, "", model.tokenizer, 77, model.prompt_layout)
    layer = model.text_model.embeddings
    with layer.per_text(layer.per_text_vectors(), prompts.context_positions):
        embeds = layer(prompts.input_ids)  # (C, L, D), with position embeddings
    embeds = embeds - layer.position_embedding.weight[: embeds.shape[1]]
    for row, expected, end in zip(embeds, case["prompt_embeds"], case["eot_index"]):
        assert_near(row[: end + 1], expected[: end + 1], case.info["tolerances"]["features_atol"])


@pytest.mark.parametrize("name", ["coop_shared_front_n4", "coop_shared_middle_n4", "coop_csc_middle_n4"])
def test_counting_name_tokens_in_their_prompt_changes_nothing_for_names_without_punctuation(name, golden_base):
    case = GoldenCase(name)
    model = prompted_model(golden_base, case, class_token_count="in_prompt").eval()
    logits = model(pixel_values=case.pixel_values).logits
    assert_near(logits, case["logits"], case.info["tolerances"]["logits_atol"])


def test_a_name_cut_in_other_places_by_the_full_stop_stays_whole_unless_it_is_counted_alone(golden_base):
    case = GoldenCase("coop_shared_front_punctuation")
    model = prompted_model(golden_base, case, class_token_count="in_prompt").eval()
    difference = (model(pixel_values=case.pixel_values).logits - case["logits"]).abs().amax(dim=0)
    # "C++" alone is "c" and "++", but "C++." is "c", "+" and "+.": the authors' code puts the vectors before "+."
    tolerance = case.info["tolerances"]["logits_atol"]
    differing = [name for name, value in zip(case.info["classnames"], difference.tolist()) if value > tolerance]
    assert differing == ["C++"]


@pytest.mark.parametrize("name", ["promptsrc_ctxinit", "promptsrc_random_n2"])
def test_promptsrc_compares_with_the_authors_teacher_term_by_term(name, golden_base):
    case = GoldenCase(name)
    assert tuple(case.info["teacher_templates"]) == PromptSRCRegularizer.teacher_templates
    model = prompted_model(golden_base, case)
    classifier = model.get_base_model()
    seen = {}

    def remember(module, args, output):
        seen["student"], seen["teacher"] = args

    classifier.regularizers["probe"] = probe = PromptSRCRegularizer(0.0, 0.0, 0.0)
    probe.register_forward_hook(remember)
    model(pixel_values=case.pixel_values, labels=case.labels)
    student, teacher = seen["student"], seen["teacher"]
    tolerances, settings = case.info["tolerances"], case.info["settings"]
    assert_near(teacher.class_embeds, case["teacher_text_features_norm"], tolerances["features_atol"])
    assert_near(teacher.image_embeds, case["teacher_image_features_norm"], tolerances["features_atol"])
    assert_near(teacher.logits, case["teacher_logits"], tolerances["logits_atol"])
    terms = {
        "loss_scl_text": settings["text_loss_weight"] * mean_distance(student.class_embeds, teacher.class_embeds),
        "loss_scl_image": settings["image_loss_weight"] * mean_distance(student.image_embeds, teacher.image_embeds),
        "loss_scl_logits": mean_divergence(student.logits, teacher.logits),
    }
    for term, value in terms.items():
        assert_near(value, case[term], tolerances["loss_atol"])


@pytest.mark.parametrize("name", ["prograd_projected_n4", "prograd_not_projected_n4"])
def test_prograd_hands_the_authors_gradient_to_the_optimizer(name, golden_base, tmp_path):
    case = GoldenCase(name)
    model = prompted_model(golden_base, case)
    (ctx,) = tensors_of(model).values()
    tolerances = case.info["tolerances"]
    outputs = model(pixel_values=case.pixel_values, labels=case.labels, return_loss_terms=True)
    assert_near(outputs.logits, case["logits"], tolerances["logits_atol"])
    assert_near(outputs.loss, case["xe_loss"], tolerances["loss_atol"])
    assert_near(outputs.loss_terms["prograd"], case["kl_loss"], tolerances["loss_atol"])

    class CheckGradient(TrainerCallback):
        num_steps = 0

        def on_pre_optimizer_step(self, *args, **kwargs):
            assert_gradient(ctx, case["grad.ctx"], tolerances["grad_max_abs_over_absmax"])
            self.num_steps += 1

    examples = [{"pixel_values": image, "labels": label} for image, label in zip(case.pixel_values, case.labels)]
    args = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=len(examples),
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    check = CheckGradient()
    ProGradTrainer(model, args, train_dataset=examples, callbacks=[check]).train()
    assert check.num_steps == 1


def plain_sgd(model, settings):
    optimizer = torch.optim.SGD(
        list(tensors_of(model).values()),
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_promptsrc_trains_and_averages_to_the_authors_tensors(golden_base, tmp_path):
    case = GoldenCase("promptsrc_gpa_5epochs")
    settings = case.info["settings"]
    model = prompted_model(golden_base, case)
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(case.pixel_values, case.labels)]
    args = TrainingArguments(
        tmp_path,
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=len(examples),
        logging_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    averaging = GaussianPromptAveraging(settings["gpa_mean"], settings["gpa_std"])
    trainer = Trainer(
        model, args, train_dataset=examples, callbacks=[averaging], optimizers=plain_sgd(model, settings)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tolerances = case.info["tolerances"]
    assert losses == pytest.approx(case["losses"].tolist(), abs=tolerances["losses_atol"])
    for name, parameter in tensors_of(model).items():
        key = next(key for key in case.tensors if key.startswith("gpa.") and name.endswith(our_name(key[4:])))
        expected = case[key]
        assert_near(parameter, expected, tolerances["params_max_abs_over_absmax"] * float(expected.abs().max()))
