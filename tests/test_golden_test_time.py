"""Test-time tuning (TPT, C-TPT, R-TPT) and TDA against numbers of the authors' code."""

import pytest
import torch
from conftest import GoldenCase, slow_param
from peft import get_peft_model
from torch.testing import assert_close

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, DynamicAdapter, TestTimeTuner


OBJECTIVES = {"tpt": "tpt", "ctpt": "c-tpt", "rtpt": "r-tpt"}
TUNING_CASES = [
    "tpt_v64_img1",
    "tpt_v64_img2",
    "tpt_v16_img2",
    "tpt_v32_2steps_img1",
    "ctpt_lambda20_img2",
    "ctpt_lambda50_img1",
    "rtpt_v64_img1",
    "rtpt_v64_img2",
]
STREAMS = ["tda_stream_30", "tda_positive_only_20", "tda_views_14"]


def classifier_of(case, base, start):
    names = [name.replace("_", " ") for name in case.info["classnames"]]
    model = CLIPForPromptClassification.from_pretrained(base, class_names=names).eval()
    if start == "words":  # the context of all cases is "a photo of a"
        return model
    model = get_peft_model(model, CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="RANDOM")).eval()
    layer = model.get_base_model().text_model.embeddings
    layer.learnable_embeddings["default"].data.copy_(case["param.ctx"])
    return model


def tuner_of(case, model):
    settings = case.info["settings"]
    return TestTimeTuner(
        model,
        OBJECTIVES[case.info["method"]],
        selection=settings["selection"],
        steps=settings["steps"],
        learning_rate=settings["lr"],
        dispersion_weight=settings.get("lambda_", 50.0),
    )


def views_of(case):
    return case.pixel_values[None, : case.info["settings"]["views"]]


def assert_near(found, expected, atol):
    assert_close(found, expected.flatten().view_as(found), atol=atol, rtol=0)


def show_flips(case, found):
    """Prints how many gradient entries changed their sign, and where the largest of them is; returns the number."""
    expected = case["grad.ctx"]
    flipped = found.sign() != expected.sign()
    largest = float(expected[flipped].abs().max() / expected.abs().max()) if flipped.any() else 0.0
    print(f"{case.name}: {int(flipped.sum())} of {flipped.numel()} signs flipped, up to {largest:.1e} of absmax")
    return int(flipped.sum())


@pytest.mark.parametrize("start", ["words", slow_param("adapter")])
@pytest.mark.parametrize("name", TUNING_CASES)
def test_kept_views_loss_gradient_and_answer_are_the_authors(name, start, golden_base):
    case = GoldenCase(name)
    tolerances = case.info["tolerances"]
    tuner = tuner_of(case, classifier_of(case, golden_base, start))
    output = tuner(views_of(case))
    assert output.kept_views[0].tolist() == case["kept_index"].tolist()
    assert_near(output.entropies[0], case["entropy"], tolerances["logits_atol"])
    assert_near(output.loss[0], case["loss"], tolerances["loss_atol"])
    absmax = float(case["grad.ctx"].abs().max())
    assert_near(output.gradients[0], case["grad.ctx"], tolerances["grad_max_abs_over_absmax"] * absmax)
    if show_flips(case, output.gradients[0]) or case.info["method"] == "rtpt":
        return  # the answers are compared below, with the authors' gradient and similarity
    last = case[f"ctx_after_step_{case.info['settings']['steps']}"]
    atol = tolerances["params_after_max_abs_over_absmax"] * float(last.abs().max())
    assert_near(output.vectors[0], last, atol)
    assert_near(output.logits[0], case["final_logits"], tolerances["logits_after_step_atol"])


@pytest.mark.parametrize("name", TUNING_CASES)
def test_answers_with_the_authors_gradient_are_theirs(name, golden_base):
    """Also those of R-TPT, with their similarity, whose rounding decides which entries of its diagonal count."""
    case = GoldenCase(name)
    tuner = tuner_of(case, classifier_of(case, golden_base, "words"))
    similarity = case["similarity"][None] if "similarity" in case.tensors else None
    output = tuner._tune(views_of(case), None, case["grad.ctx"][None], similarity)
    assert_near(output.logits[0], case["final_logits"], case.info["tolerances"]["logits_after_step_atol"])


@pytest.mark.parametrize("name", [name for name in TUNING_CASES if name.startswith("rtpt")])
def test_no_view_is_a_neighbor_of_its_own(name, golden_base):
    """Unlike in the authors' code, the whole diagonal is left out, whatever it was rounded to."""
    case = GoldenCase(name)
    tuner = tuner_of(case, classifier_of(case, golden_base, "words"))
    logits = tuner._tune(views_of(case), None, case["grad.ctx"][None]).logits[0]
    assert_near(logits, case["exact_mask.final_logits"], case.info["tolerances"]["logits_after_step_atol"])
    assert (logits - case["final_logits"].flatten()).abs().max() > 0.1


def adapter_of(case):
    settings = case.info["settings"]
    positive, negative = settings["positive"], settings["negative"]
    arguments = {
        "positive_size": positive["shot_capacity"],
        "positive_weight": positive["alpha"],
        "positive_sharpness": positive["beta"],
        "negative_size": negative.get("shot_capacity", 0),
    }
    if negative["enabled"]:
        arguments |= {
            "negative_weight": negative["alpha"],
            "negative_sharpness": negative["beta"],
            "entropy_range": tuple(negative["entropy_threshold"][name] for name in ("lower", "upper")),
            "probability_range": tuple(negative["mask_threshold"][name] for name in ("lower", "upper")),
        }
    return DynamicAdapter(case["class_weights"], settings["logit_scale"], **arguments)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_answered_as_by_the_authors(name):
    case = GoldenCase(name)
    adapter = adapter_of(case)
    parts = case["features"].split([1, 4, len(case["features"]) - 5])  # in whatever batches the images come
    logits = torch.cat([adapter(part).logits for part in parts])
    assert_close(logits, case["logits"], atol=case.info["tolerances"]["logits_atol"], rtol=0)
    for kind, cache in (("pos", adapter.positive), ("neg", adapter.negative)):
        if f"{kind}_cache.classes" not in case.tensors:
            assert not cache.items
            continue
        classes, entropies, embeds, probabilities = cache.content()
        assert classes.tolist() == case[f"{kind}_cache.classes"].tolist()
        assert_near(entropies, case[f"{kind}_cache.entropy"], 5e-5)
        assert_near(embeds, case[f"{kind}_cache.keys"], 5e-5)
        if kind == "neg":
            assert_near(probabilities, case["neg_cache.probabilities"], 5e-5)


def test_the_defaults_are_the_published_ones():
    """The numbers of the case are those of the authors for ImageNet."""
    case = GoldenCase("tda_stream_30")
    adapter = DynamicAdapter(case["class_weights"])
    assert_close(adapter(case["features"]).logits, adapter_of(case)(case["features"]).logits)
