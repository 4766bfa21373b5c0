"""Class heads and two-stage tuning equal the code of their authors; see tests/golden/README.md."""

import math

import pytest
import torch
from conftest import GOLDEN, GoldenCase
from peft import get_peft_model
from torch.optim.lr_scheduler import CosineAnnealingLR

from clip_prompt_peft import (
    CLIPForPromptClassification,
    fit_class_head,
    method_config,
    start_class_head,
)


BASE = str(GOLDEN / "base")
LINEAR = {"clap_l2_pets": "clap", "zslp_imagenet_templates": "zs-lp"}
TIP = ["tip_adapter_a2_b1", "tip_adapter_a1.17_b5.5_templates"]
TWO_STAGES = ["twosfs_both", "twosfs_text_from1"]


def assert_near(case, kind, value, expected):
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=case.info["tolerances"][f"{kind}_atol"])


def assert_alike(case, value, expected, kind="grad_max_abs_over_absmax"):
    assert (value.detach() - expected).abs().max() <= case.info["tolerances"][kind] * expected.abs().max()


def new_model(case, method, **fields):
    """The classifier of a case with the adapter of a method, not trained."""
    base = CLIPForPromptClassification.from_pretrained(BASE, class_names=case.info["classnames"])
    base.logit_scale.data.fill_(math.log(case.info["settings"].get("logit_scale", 30)))
    return get_peft_model(base, method_config(method, base, **fields))


def tensor_of(model, name):
    """A tensor of the head."""
    return model.get_base_model().class_head.ln_tuning_head["default"].get_parameter(name)


def with_prototypes(case, method):
    return new_model(case, method, start_templates=case.info["settings"]["templates"]).train()


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_head_has_the_start_the_loss_and_the_gradient_of_its_authors(name):
    case = GoldenCase(name)
    model = with_prototypes(case, LINEAR[name])
    weights = tensor_of(model, "class_embeds")
    assert_near(case, "features", weights, case["text_prototypes"])
    assert_near(case, "logits", model.eval()(image_embeds=case["features"]).logits, case["logits_zeroshot"])
    fit_class_head(model, {"image_embeds": case["features"], "labels": case["labels"]})
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    if name.startswith("clap"):
        assert_near(case, "features", head.pull_weights, case["lambda"])
    weights.data.copy_(case["param.prototypes"])
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    out = model.train()(image_embeds=case["features"], labels=case["labels"], return_loss_terms=True)
    out.loss.backward()
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_near(case, "loss", out.loss_terms["cross_entropy"], case["ce_loss"])
    if name.startswith("clap"):
        assert_near(case, "loss", out.loss_terms["pull"], case["constraint"])
    assert_alike(case, weights.grad, case["grad.prototypes"])
    optimizer.step()
    assert_alike(case, weights, case["after.prototypes"])


def test_clap_trains_as_its_authors_do():
    case = GoldenCase("clap_trajectory_sgd_10")
    model = with_prototypes(case, "clap")
    fit_class_head(model, {"image_embeds": case["features"], "labels": case["labels"]})
    weights = tensor_of(model, "class_embeds")
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    losses = []
    for step in range(10):
        rows = slice(20 * (step % 2), 20 * (step % 2) + 20)
        loss = model(image_embeds=case["features"][rows], labels=case["labels"][rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step + 1 in (1, 5):
            assert_alike(case, weights, case[f"prototypes_after_step_{step + 1}"], "params_max_abs_over_absmax")
    assert_near(case, "losses", torch.stack(losses), case["losses"])
    assert_alike(case, weights, case["prototypes_final"], "params_max_abs_over_absmax")
    logits = model.eval()(image_embeds=case["features"]).logits
    assert_near(case, "logits_after_step", logits, case["logits_final"])


def with_cache(case, method, features):
    settings = case.info["settings"]
    templates = settings["templates"]
    model = new_model(case, method, alpha=settings["alpha"], beta=settings["beta"], start_templates=templates)
    rows = model.get_base_model().class_head.ln_tuning_head["default"].class_embeds
    assert_near(case, "features", rows, case["class_weights"])
    fit_class_head(model, {"image_embeds": features, "labels": case["labels"]})
    return model.eval()


@pytest.mark.parametrize("name", TIP)
@torch.no_grad()
def test_a_cache_has_the_keys_and_the_logits_of_its_authors(name):
    case = GoldenCase(name)
    model = with_cache(case, "tip-adapter", case["augmented_features"].transpose(0, 1))
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = model.get_base_model().class_head.ln_tuning_head["default"]
    assert_near(case, "features", head.keys, case["cache_keys"])
    assert_near(case, "logits", model(image_embeds=case["test_features_norm"]).logits, case["logits"])
    with model.disable_adapter():  # the class embeddings of one template
        zero_shot = model(image_embeds=case["test_features_norm"]).logits
    if len(case.info["settings"]["templates"]) == 1:
        assert_near(case, "logits", zero_shot, case["logits_zeroshot"])


def test_trained_keys_go_the_way_of_their_authors():
    case = GoldenCase("tip_f_trajectory_10")
    model = with_cache(case, "tip-adapter-f", case["train_features"])
    keys = tensor_of(model, "keys")
    assert [parameter is keys for parameter in model.parameters() if parameter.requires_grad] == [True]
    keys.data.copy_(case["param.cache_keys_initial"])
    settings = {name: case.info["settings"][name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([keys], **settings)
    schedule, losses = CosineAnnealingLR(optimizer, 10), []
    model.train()
    for step in range(10):
        rows = slice(10 * (step % 2), 10 * (step % 2) + 10)
        out = model(image_embeds=case["train_features"][rows], labels=case["labels"][rows])
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            assert_near(case, "logits", out.logits, case["logits_first_step"])
            assert_alike(case, keys.grad, case["grad_first_step.cache_keys"])
        optimizer.step()
        schedule.step()
        losses.append(out.loss.detach())
        if step + 1 in (1, 5):
            assert_alike(case, keys, case[f"cache_keys_after_step_{step + 1}"], "params_max_abs_over_absmax")
    assert_near(case, "losses", torch.stack(losses), case["losses"])
    assert_alike(case, keys, case["cache_keys_final"], "params_max_abs_over_absmax")
    logits = model.eval()(image_embeds=case["test_features_norm"]).logits
    assert_near(case, "logits_after_step", logits, case["test_logits_final"])


def two_stages(case):
    """The classifier of a case with 2SFS, and the trained LayerNorms by the names of the authors."""
    settings = case.info["settings"]
    names = case.info["name_in_transformers"]
    fields = {}
    if settings["modality"] != "both" or settings["text_start"] or settings["vision_start"]:
        modules = sorted({name.rpartition(".")[0] for name in names.values()})
        fields["target_modules"] = "|".join(name.replace(".", r"\.") for name in modules)
    model = new_model(case, "2sfs", **fields)
    parameters = dict(model.named_parameters())
    layers = {}
    for theirs, ours in names.items():
        path, _, kind = ours.rpartition(".")
        layers[theirs] = parameters[f"base_model.model.{path}.ln_tuning_layers.default.{kind}"]
    trained = {name for name, value in parameters.items() if value.requires_grad and "ln_tuning_head" not in name}
    assert len(trained) == len(layers)
    return model, layers


@pytest.mark.parametrize("name", TWO_STAGES)
def test_the_first_stage_has_the_logits_and_all_gradients_of_the_authors(name):
    case = GoldenCase(f"{name}_stage1")
    model, layers = two_stages(case)
    assert set(layers) == set(case.info["trained_parameters"])
    for theirs, parameter in layers.items():
        parameter.data.copy_(case[f"param.{theirs}"])
    assert sum(value.numel() for value in layers.values()) == case.info["settings"]["parameters_trained"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-2)
    out = model.train()(pixel_values=case.pixel_values, labels=case.labels)
    out.loss.backward()
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    optimizer.step()
    for theirs, parameter in layers.items():
        expected = case[f"grad.{theirs}"]
        assert_alike(case, parameter.grad, expected)
        is_clear = expected.abs() > 1e-3 * expected.abs().max()
        after = case[f"after.{theirs}"]
        limit = case.info["tolerances"]["params_after_max_abs_over_absmax"] * after.abs().max()
        assert ((parameter.detach() - after).abs()[is_clear] <= limit).all()
    moved = [key for key, value in model.named_parameters() if value.grad is not None]
    assert len(moved) == len(layers)  # neither the head nor any other LayerNorm


@pytest.mark.parametrize("name", TWO_STAGES)
def test_the_second_stage_starts_and_goes_on_as_the_authors_do(name):
    case = GoldenCase(f"{name}_stage2")
    model, layers = two_stages(case)
    for theirs, parameter in layers.items():
        parameter.data.copy_(case[f"tuned.{theirs}"])
    start_class_head(model)
    weights = tensor_of(model, "class_embeds")
    assert [value is weights for value in model.parameters() if value.requires_grad] == [True]
    assert_near(case, "features", weights, case["param.classifier_initial"])
    out = model.train()(pixel_values=case.pixel_values, labels=case.labels)
    assert_near(case, "logits", out.logits, case["logits_initial"])
    assert_near(case, "loss", out.loss, case["loss_initial"])
    weights.data.copy_(case["param.classifier"])
    optimizer = torch.optim.AdamW([weights], lr=2e-4, weight_decay=1e-2)
    out = model(pixel_values=case.pixel_values, labels=case.labels)
    out.loss.backward()
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_alike(case, weights.grad, case["grad.classifier"])
    model.eval()
    known = model.class_names
    names = [text.replace("_", " ") for text in case.info["selective_categories"]]
    model.set_class_names(names)
    assert_near(case, "logits", model(pixel_values=case.pixel_values).logits, case["logits_selective"])
    model.set_class_names(known)
    assert_near(case, "logits", model(pixel_values=case.pixel_values).logits, case["logits"])
    optimizer.step()
    assert_alike(case, weights, case["after.classifier"], "params_after_max_abs_over_absmax")
