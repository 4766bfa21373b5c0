"""CLIP-LoRA equals the code of its authors, and their files become adapters of peft; see tests/golden/README.md."""

import math

import pytest
import torch
from conftest import GOLDEN, GoldenCase
from peft import PeftModel, get_peft_model

from clip_prompt_peft import AutoModelForPromptClassification, CLIPForPromptClassification, method_config
from clip_prompt_peft.commands.convert import convert_checkpoint


BASE = str(GOLDEN / "base")
CASES = ["clip_lora_r2_qkv_both", "clip_lora_r3_qkvo_text_up", "clip_lora_r4_kv_vision_bottom"]
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def classifier(case):
    model = CLIPForPromptClassification.from_pretrained(BASE, class_names=case.info["classnames"])
    assert model.prompt_template == case.info["settings"]["template"]
    model.logit_scale.data.fill_(math.log(case.info["settings"]["logit_scale"]))
    return model


def settings_of(case):
    """The fields that differ from those of the method."""
    settings = case.info["settings"]
    fields = {"r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"]}
    if settings["position"] == "all":
        return fields
    tower = f"{settings['encoder']}_model"
    layers = "|".join(map(str, settings[f"{settings['encoder']}_layers"]))
    names = "|".join(NAMES[name] for name in settings["params"])
    return {**fields, "target_modules": rf"{tower}\.encoder\.layers\.({layers})\.self_attn\.({names})"}


def with_lora(case):
    """The classifier of a case with its tensors, and the parameters by the names of the authors."""
    base = classifier(case)
    model = get_peft_model(base, method_config("clip-lora", base, **settings_of(case)))
    parameters = {name.replace(".default.", "."): value for name, value in model.named_parameters()}
    named = {theirs: parameters[ours] for theirs, ours in case.info["name_in_a_peft_adapter"].items()}
    for name, parameter in named.items():
        parameter.data.copy_(case[f"param.{name}"])
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in named.values()}
    return model, named


def assert_near(case, kind, value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=case.info["tolerances"][f"{kind}_atol"])


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_all_gradients_are_those_of_the_authors(name):
    case = GoldenCase(name)
    model, named = with_lora(case)
    out = model.train()(pixel_values=case.pixel_values, labels=case.labels)
    out.loss.backward()
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_near(case, "features", model.get_class_embeds(), case["text_features_norm"])
    for key, parameter in named.items():
        expected = case[f"grad.{key}"]
        limit = case.info["tolerances"]["grad_max_abs_over_absmax"]
        assert (parameter.grad - expected).abs().max() <= limit * expected.abs().max(), key


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_switched_off_it_is_the_zero_shot_model_and_merged_it_is_the_tuned_one(name):
    case = GoldenCase(name)
    model, _ = with_lora(case)
    model.eval()
    with model.disable_adapter():
        assert_near(case, "logits", model(pixel_values=case.pixel_values).logits, case["logits_zeroshot"])
    assert_near(case, "logits", model(pixel_values=case.pixel_values).logits, 100 * case["cosine_eval"])
    merged = model.merge_and_unload()
    assert_near(case, "logits", merged(pixel_values=case.pixel_values).logits, 100 * case["cosine_eval"])


def authors_file(name, path):
    """The file as the authors' code writes it."""
    case = GoldenCase(f"{name}_file")
    content = {"metadata": case.info["pt_structure"]["metadata"]}
    for key, tensor in case.tensors.items():
        *parts, last = key.split(".")
        place = content
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = tensor
    torch.save(content, path)
    return case


@pytest.mark.filterwarnings("ignore:The authors' code has no table")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_converted_file_is_an_adapter_of_peft_with_the_authors_answers(name, tmp_path):
    case, file = GoldenCase(name), authors_file(name, tmp_path / "lora_weights.pt")
    model = convert_checkpoint(tmp_path / "lora_weights.pt", BASE)
    assert type(model) is PeftModel
    wanted = {**file.info["peft_config"], "lora_dropout": 0.25}
    assert {field: getattr(model.active_peft_config, field) for field in wanted} == wanted
    parameters = {name.replace(".default.", "."): value for name, value in model.named_parameters()}
    for theirs, ours in file.info["name_in_a_peft_adapter"].items():
        assert torch.equal(parameters[ours], file[theirs])
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForPromptClassification.from_pretrained(
        tmp_path / "adapter", class_names=case.info["classnames"]
    ).eval()
    loaded.logit_scale.fill_(math.log(100))
    assert_near(case, "logits", loaded(pixel_values=case.pixel_values).logits, 100 * case["cosine_eval"])
    assert_near(case, "logits", 100 * case["cosine_eval"], case["logits"])
