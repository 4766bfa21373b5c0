"""The configuration of a method by its name, and the life of a LoRA adapter in a classifier of every family."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import as_if_trained, logits_of
from conftest import CLASS_NAMES, TINY_CLIP, slow_param
from families import FAMILIES
from hub_stand_in import HubStandIn
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel, TrainingArguments

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    CLIPPromptTuningConfig,
    method_config,
    training_recipe,
)
from clip_prompt_peft.training.configs import trains_image_tower


EXAMPLES = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 4} for i in range(6)]


def with_lora(classifier, **fields):
    return get_peft_model(classifier, method_config("clip-lora", classifier, **fields)).eval()


def test_clip_lora_is_a_configuration_of_peft(classifier):
    config = method_config("clip-lora", classifier)
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (2, 1, True, 0.25)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"} and config.task_type is None
    assert method_config("clip-lora", classifier, r=8).r == 8
    model = get_peft_model(classifier, config)
    assert type(model) is PeftModel and not model.get_base_model().logit_scale.requires_grad
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {1 / math.sqrt(2)}


def test_a_preset_has_the_configuration_of_prompts(classifier):
    config = method_config("maple", classifier, num_virtual_tokens=3, num_vision_virtual_tokens=3)
    assert type(config) is CLIPPromptTuningConfig and config.num_virtual_tokens == 3
    assert trains_image_tower(config) and not trains_image_tower(method_config("coop", classifier))
    with pytest.raises(ValueError, match="no preset 'clip-lore'"):
        method_config("clip-lore", classifier)


def test_a_vit_b_16_has_184320_values():
    from transformers import CLIPConfig

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    config = method_config("clip-lora", clip)
    config.init_lora_weights = False
    with torch.device("meta"):
        assert get_peft_model(clip, config).get_nb_trainable_parameters()[0] == 184_320


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_of_both_towers_are_trained_and_nothing_else(name):
    family = FAMILIES[name]
    model = with_lora(family.classifier())
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    for tower in ("text_model", "vision_model"):
        assert sum(tower in key for key in trained) == 3 * 3 * 2  # layers; query, key and value; A and B
    layers = (".encoder.layer", ".encoder.stages.")
    assert all(any(part in key for part in layers) and ".lora_" in key for key in trained)
    assert len(trained) == 2 * 3 * 3 * 2


@pytest.mark.parametrize("part", ["self_attn", "layers"])
def test_a_tower_without_projections_is_refused(part):
    classifier = FAMILIES["CLIP"].classifier()
    if part == "layers":
        classifier.text_model.encoder.layers = torch.nn.ModuleList()
    else:
        classifier.text_model.encoder.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="the text tower of CLIPForPromptClassification has .*without q_proj, k_proj"):
        method_config("clip-lora", classifier)


def test_a_model_with_one_tower_is_refused(clip):
    with pytest.raises(ValueError, match="the vision tower of CLIPTextTransformer has no layers|vision tower of"):
        method_config("clip-lora", clip.text_model)


@pytest.mark.parametrize("name", ["CLIP", slow_param("MetaClip2"), slow_param("Siglip"), slow_param("Siglip2"),
                                  "ChineseCLIP", slow_param("AltCLIP"), "Aimv2", "GroupViT"])  # fmt: skip
def test_it_is_saved_loaded_switched_disabled_and_merged_in_every_family(name, tmp_path):
    family = FAMILIES[name]
    family.save(tmp_path / "base")
    names = family.classifier().class_names
    load = AutoModelForPromptClassification.from_pretrained
    inputs = family.image_inputs()

    @torch.no_grad()
    def logits(model):
        return model.eval()(**inputs).logits

    zero_shot = logits(load(tmp_path / "base", class_names=names))
    model = with_lora(load(tmp_path / "base", class_names=names))
    torch.testing.assert_close(logits(model), zero_shot)  # B is zero
    tuned = logits(as_if_trained(model))
    assert not torch.allclose(tuned, zero_shot, atol=1e-2)
    model.save_pretrained(tmp_path / "lora")
    loaded = load(tmp_path / "lora", class_names=names)
    torch.testing.assert_close(logits(loaded), tuned)  # AIMv2's pooling is not always the same to the last bit
    assert loaded.class_names == names
    base = load(tmp_path / "base", class_names=names)
    model = PeftModel.from_pretrained(base, tmp_path / "lora", adapter_name="one")
    model.add_adapter("two", method_config("clip-lora", base))
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), zero_shot)
    model.set_adapter("one")
    torch.testing.assert_close(logits(model), tuned)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), zero_shot)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))  # with its class names


FRESH = """
import sys, torch
from clip_prompt_peft import AutoModelForPromptClassification
folder, template, *names = sys.argv[1:]
model = AutoModelForPromptClassification.from_pretrained(folder, class_names=names, prompt_template=template).eval()
pixel_values, expected = torch.load(folder + "/expected.pt")
assert torch.equal(model(pixel_values=pixel_values).logits, expected)
"""


@pytest.mark.slow
def test_a_trained_adapter_is_loaded_in_a_fresh_process(classifier, pixel_values, tmp_path):
    classifier.set_prompt_template("an icon of a {}.")
    model = with_lora(classifier)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    recipe = training_recipe("clip-lora", model, len(EXAMPLES), shots=1, max_steps=3, learning_rate=0.05, use_cpu=True)
    args = TrainingArguments(tmp_path, report_to="none", disable_tqdm=True, save_strategy="no", **recipe.arguments)
    trainer = recipe.trainer_class(model, args, train_dataset=EXAMPLES, optimizers=recipe.optimizers)
    trainer.train()
    trainer.save_model(str(tmp_path / "lora"))
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    expected = logits_of(model.eval(), pixel_values)
    assert not torch.allclose(expected, logits_of(model.unload(), pixel_values), atol=1e-2)
    torch.save((pixel_values, expected), tmp_path / "lora/expected.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "lora"), "an icon of a {}.", *CLASS_NAMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_trains_in_bfloat16_and_under_autocast(classifier, pixel_values, labels):
    model = with_lora(classifier.bfloat16()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pixel_values=pixel_values.bfloat16(), labels=labels).loss
    loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert all(torch.isfinite(value.grad).all() for value in trained.values())
    assert all(value.grad.any() for name, value in trained.items() if "lora_B" in name)  # A has none while B is zero


PUSH = """
import sys, torch
from peft import get_peft_model
from clip_prompt_peft import AutoModelForPromptClassification, method_config
names, pixel_values = ["cat", "dog"], torch.ones(1, 3, 48, 48)
load = AutoModelForPromptClassification.from_pretrained
base = load("me/clip", class_names=names)
config = method_config("clip-lora", base, init_lora_weights=False)
assert len(config.revision) == 40
model = get_peft_model(base, config).eval()
model.push_to_hub("me/lora")
loaded = load("me/lora", class_names=names).eval()
assert torch.equal(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)
assert loaded.hub_settings.revision == config.revision
"""


@pytest.mark.slow
def test_it_is_pushed_and_loaded_with_the_commit_of_its_base_model(tmp_path):
    with HubStandIn() as hub:
        hub.repos["me/clip"] = {path.name: path.read_bytes() for path in Path(TINY_CLIP).iterdir()}
        env = hub.client_environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", PUSH], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.repos["me/lora"].keys()
