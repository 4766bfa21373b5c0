"""TCP, class-aware prompts, against numbers of its authors' code: logits, losses, every gradient, and a training."""

import pytest
import torch
from conftest import GoldenCase
from peft import get_peft_model
from torch.testing import assert_close

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.training.recipes import ADAM


FORWARD_CASES = ["tcp_doing_layer2", "tcp_pets_layer2", "tcp_satellite_layer3"]
NETWORK = {"linear1": "in", "linear2": "out"}


def our_name(name, layer):
    """Where one of the authors' tensors lives here."""
    if name == "ctx":
        return "base_model.model.text_model.embeddings.learnable_embeddings.default"
    _, linear, kind = name.split(".")
    return f"base_model.model.text_model.encoder.layers.{layer}.learnable_class_{NETWORK[linear]}.default.{kind}"


def template_of(prompt, class_name):
    return prompt.replace(class_name, "{}").removeprefix("X X X X ")  # placeholders, which the library puts in itself


def tcp(case, base, suffix=""):
    """The classifier of a case in training mode, with the authors' tensors `param.NAME + suffix` in it."""
    info, settings = case.info, case.info["settings"]
    names = [name.replace("_", " ") for name in info["classnames"]]
    config = CLIPPromptTuningConfig.from_preset(
        "tcp",
        prompt_template=template_of(info["prompts"][0], names[0]),
        teacher_templates=[template_of(info["teacher_prompts"][0], names[0])],
        num_virtual_tokens=settings["n_ctx"],
        class_aware_layer=settings["inject_before_text_layer"],
        regularizer_weights={"weight": settings["w"]},
    )
    model = get_peft_model(CLIPForPromptClassification.from_pretrained(base, class_names=names), config).train()
    tensors = tensors_of(model)
    values = {key.removeprefix("param."): value for key, value in case.tensors.items() if key.startswith("param.")}
    assert len(values) == len(tensors)
    for name, value in values.items():
        parameter = tensors[our_name(name.removesuffix(suffix), settings["inject_before_text_layer"])]
        assert parameter.shape == value.shape
        parameter.data.copy_(value)
    return model


def tensors_of(model):
    return {name: value for name, value in model.named_parameters() if "learnable_" in name}


def assert_near(found, expected, atol):
    assert_close(found.detach(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_loss_and_every_gradient_are_the_authors(name, path, golden_base):
    case = GoldenCase(name)
    model, tolerances = tcp(case, golden_base), case.info["tolerances"]
    classifier = model.get_base_model()
    classifier.class_encoder.path = path
    outputs = model(pixel_values=case.pixel_values, labels=case.labels, return_loss_terms=True)
    outputs.loss.backward()
    assert_near(outputs.logits, case["logits"], tolerances["logits_atol"])
    assert_near(outputs.loss, case["loss"], tolerances["loss_atol"])
    assert_near(outputs.loss_terms["cross_entropy"], case["ce_loss"], tolerances["loss_atol"])
    weighted = case.info["settings"]["w"] * case["score"]
    assert_near(outputs.loss_terms["kgcoop"], weighted, 8 * tolerances["loss_atol"])
    tensors = tensors_of(model)
    gradients = [key for key in case.tensors if key.startswith("grad.")]
    assert len(gradients) == len(tensors)
    for key in gradients:
        name = our_name(key.removeprefix("grad."), case.info["settings"]["inject_before_text_layer"])
        atol = tolerances["grad_max_abs_over_absmax"] * float(case[key].abs().max())
        assert_near(tensors[name].grad, case[key], atol)
    with torch.no_grad():
        assert_near(model.eval()(pixel_values=case.pixel_values).logits, case["logits"], tolerances["logits_atol"])


@pytest.mark.parametrize("name", [*FORWARD_CASES, "tcp_pets_layer2_new_classes"])
def test_class_vectors_are_made_of_the_zero_shot_embeddings_as_the_authors_make_them(name, golden_base):
    case = GoldenCase(name)
    model, atol = tcp(case, golden_base).eval(), case.info["tolerances"]["features_atol"]
    classifier = model.get_base_model()
    with model.disable_adapter():
        classifier.set_prompt_template(template_of(case.info["teacher_prompts"][0], classifier.class_names[0]))
        priors = classifier.get_class_embeds()
    assert_near(priors, case["class_prior"], atol)
    layer = classifier.text_model.encoder.layers[case.info["settings"]["inject_before_text_layer"]]
    assert_near(layer.class_vectors(priors), case["class_prompts"], atol)
    assert_near(classifier.get_class_embeds(), case["text_features_norm"], atol)


def test_new_classes_get_vectors_of_their_own(golden_base):
    """The adapter that was trained on other classes answers for new ones as the authors' does."""
    trained, new = GoldenCase("tcp_pets_layer2"), GoldenCase("tcp_pets_layer2_new_classes")
    model = tcp(trained, golden_base).eval()
    model.get_base_model().set_class_names([name.replace("_", " ") for name in new.info["classnames"]])
    with torch.no_grad():
        logits = model(pixel_values=new.pixel_values).logits
    assert_near(logits, new["logits"], new.info["tolerances"]["logits_atol"])


def test_ten_steps_of_adam_end_at_the_authors_values(golden_base):
    case = GoldenCase("tcp_trajectory_adam_10_layer2")
    model, tolerances, settings = tcp(case, golden_base, "_initial"), case.info["tolerances"], case.info["settings"]
    optimizer_class, arguments = ADAM
    assert arguments == {name: settings[name] for name in ("eps", "weight_decay")}
    optimizer = optimizer_class(tensors_of(model).values(), lr=settings["lr"], **arguments)
    losses = []
    for step in range(settings["steps"]):
        rows = case["batch_rows"][step % 2].long()
        loss = model(pixel_values=case.pixel_values[rows], labels=case.labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert_near(torch.stack(losses), case["losses"], tolerances["losses_atol"])
    tensors = tensors_of(model)
    for key in [key for key in case.tensors if key.endswith("_final") and not key.startswith("logits")]:
        name = our_name(key.removesuffix("_final"), settings["inject_before_text_layer"])
        assert_near(tensors[name], case[key], tolerances["params_max_abs_over_absmax"] * float(case[key].abs().max()))
    with torch.no_grad():
        logits = model.eval()(pixel_values=case.pixel_values).logits
    assert_near(logits, case["logits_final"], tolerances["logits_after_step_atol"])
