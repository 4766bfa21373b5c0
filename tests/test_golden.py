"""The numbers that the original authors' code computed; see tests/golden/README.md."""

import pytest
import torch
from adapters import layer_of, vectors_of
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, build_class_prompts


COOP = ["coop_shared_end_n4", "coop_shared_end_n16", "coop_ctxinit_end"]


def assert_near(case, kind, value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=case.info["tolerances"][f"{kind}_atol"])


def assert_gradient_near(case, value, expected):
    limit = case.info["tolerances"]["grad_max_abs_over_absmax"]
    assert (value - expected).abs().max() <= limit * expected.abs().max()


def normalized(features):
    return features / features.norm(dim=-1, keepdim=True)


def classifier(case, base, prompt_template="a photo of a {}."):
    return CLIPForPromptClassification.from_pretrained(
        base, class_names=case.info["classnames"], prompt_template=prompt_template
    ).eval()


def coop(case, base, vectors):
    """CoOp with its class token at the end: vectors in place of all words in front of the class name."""
    settings = case.info["settings"]
    template = "{}." if settings["ctx_init"] is None else settings["ctx_init"] + " {}."
    model = get_peft_model(
        classifier(case, base, template), CLIPPromptTuningConfig(num_virtual_tokens=settings["n_ctx"])
    )
    vectors_of(model).data.copy_(case[vectors])
    return model.eval()


def seed_replace(case, base):
    settings = case.info["settings"]
    config = CLIPPromptTuningConfig(
        num_virtual_tokens=settings["n_ctx"], start_idx=settings["start_idx"], prompt_template=settings["template"]
    )
    model = get_peft_model(CLIPModel.from_pretrained(base), config).eval()
    vectors_of(model).data.copy_(case["param.ctx"])
    return model


def test_zero_shot(golden, golden_base):
    case = golden("zeroshot")
    model = classifier(case, golden_base)
    out = model(pixel_values=case.pixel_values, labels=case.labels)
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_near(case, "features", model.get_class_embeds(), case["text_features_norm"])
    image_embeds = model.get_image_features(case.pixel_values).pooler_output
    assert_near(case, "features", normalized(image_embeds), case["image_features_norm"])


@pytest.mark.parametrize("name", ["seed_replace_s1_n4", "seed_replace_s2_n3"])
def test_vectors_in_a_plain_clip_with_its_own_loss(golden, golden_base, name):
    case = golden(name)
    model = seed_replace(case, golden_base)
    tokenizer = AutoTokenizer.from_pretrained(golden_base)
    texts = tokenizer(case.info["texts"], padding=True, return_tensors="pt")
    assert torch.equal(texts["input_ids"], case["input_ids"])
    out = model(**texts, pixel_values=case.pixel_values, return_loss=True)
    out.loss.backward()
    assert_near(case, "logits", out.logits_per_image, case["logits_per_image"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_near(case, "features", normalized(out.text_embeds), case["text_embeds_norm"])
    assert_near(case, "features", normalized(out.image_embeds), case["image_embeds_norm"])
    assert_gradient_near(case, vectors_of(model).grad, case["grad.ctx"])


@pytest.mark.parametrize("name", COOP)
def test_coop_writes_the_same_prompts(golden, golden_base, name):
    case = golden(name)
    model = coop(case, golden_base, "param.ctx").base_model.model
    prompts = build_class_prompts(
        model.class_names, model.prompt_template, model.tokenizer, max_length=77, layout=model.prompt_layout
    )
    assert prompts.texts == case.info["prompts"]
    assert torch.equal(prompts.attention_mask.sum(dim=1) - 1, case["eot_index"])
    for ids, expected, end in zip(prompts.input_ids, case["input_ids"], case["eot_index"]):
        assert torch.equal(ids[: end + 1], expected[: end + 1])


@pytest.mark.parametrize("name", COOP)
def test_coop_composes_the_same_prompt_embeddings(golden, golden_base, name):
    case = golden(name)
    layer = layer_of(coop(case, golden_base, "param.ctx"))
    length = case["prompt_embeds"].shape[1]
    embeds = layer(case["input_ids"][:, :length])  # (C, L, D), with position embeddings
    assert_near(case, "features", embeds - layer.position_embedding.weight[:length], case["prompt_embeds"])


@pytest.mark.parametrize("name", COOP)
def test_coop_has_the_same_logits_loss_and_gradient(golden, golden_base, name):
    case = golden(name)
    model = coop(case, golden_base, "param.ctx")
    out = model(pixel_values=case.pixel_values, labels=case.labels)
    out.loss.backward()
    assert_near(case, "logits", out.logits, case["logits"])
    assert_near(case, "loss", out.loss, case["loss"])
    assert_near(case, "features", model.base_model.model.get_class_embeds(), case["text_features_norm"])
    assert_gradient_near(case, vectors_of(model).grad, case["grad.ctx"])


@pytest.mark.parametrize("name", COOP)
def test_coop_merged_into_a_plain_clip_has_the_same_logits(golden, golden_base, name):
    case = golden(name)
    clip = coop(case, golden_base, "param.ctx").merge_and_unload().to_clip()
    out = clip(input_ids=case["input_ids"], pixel_values=case.pixel_values)  # all 77 positions, padded with zeros
    assert_near(case, "logits", out.logits_per_image, case["logits"])


def test_coop_trains_along_the_same_trajectory(golden, golden_base):
    case = golden("coop_trajectory_shared_end_n4")
    settings = case.info["settings"]
    model = coop(case, golden_base, "param.ctx_initial").train()
    vectors = vectors_of(model)
    optimizer = torch.optim.SGD(
        [vectors],
        **{name: settings[name] for name in ("lr", "momentum", "weight_decay", "dampening", "nesterov")},
    )
    losses, norms, visited = [], [], {}
    for step in range(settings["steps"]):
        batch = step % len(case["batches_labels"])
        loss = model(pixel_values=case["batches_pixel_values"][batch], labels=case["batches_labels"][batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        norms.append(vectors.grad.norm())
        visited[f"ctx_after_step_{step + 1}"] = vectors.detach().clone()
    visited["ctx_final"] = vectors.detach()
    torch.testing.assert_close(
        torch.stack(losses), case["losses"], rtol=0, atol=case.info["tolerances"]["losses_atol"]
    )
    limit = case.info["tolerances"]["params_max_abs_over_absmax"]
    for name in ("ctx_after_step_1", "ctx_after_step_5", "ctx_after_step_10", "ctx_final"):
        assert (visited[name] - case[name]).abs().max() <= limit * case[name].abs().max()
    assert (torch.stack(norms) - case["grad_norms"]).abs().max() <= limit * case["grad_norms"].max()
