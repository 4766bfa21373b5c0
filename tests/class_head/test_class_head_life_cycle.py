"""The life of a class head: made, trained, saved, loaded, switched, disabled, mixed, removed, and never merged."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from adapters import CONFIG, WEIGHTS, as_if_trained, change_config, logits_of
from cases import new_classifier
from conftest import CLASS_NAMES, TINY_CLIP
from families import FAMILIES
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    ClassHeadConfig,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    fit_class_head,
    method_config,
    start_class_head,
)
from clip_prompt_peft.class_head.presets import HEAD_PRESETS


NAMES = list(HEAD_PRESETS)


def support(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width, num_classes = model.get_base_model().embed_width, len(model.class_names)
    labels = torch.arange(12) % num_classes
    return {"image_embeds": torch.randn(12, width, generator=generator), "labels": labels}


def headed(name, base=None, seed=0, adapter_name="default", **fields):
    """A classifier with a head as if it had been trained."""
    base = new_classifier() if base is None else base
    model = get_peft_model(base, method_config(name, base, **fields), adapter_name=adapter_name)
    return trained(model, seed)


def trained(model, seed=0):
    if model.active_peft_config.target_modules is None:
        fit_class_head(model, support(model, seed))
    as_if_trained(model, seed=seed)
    return model.eval()


@pytest.fixture
def zero_shot(pixel_values):
    return logits_of(new_classifier().eval(), pixel_values)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_head_is_the_zero_shot_model(name, pixel_values, zero_shot):
    base = new_classifier()
    model = get_peft_model(base, method_config(name, base)).eval()
    if name.startswith("tip"):
        with pytest.raises(ValueError, match=r"cache of this head is empty.*fit_class_head"):
            logits_of(model, pixel_values)
        fit_class_head(model, support(model))
        assert not torch.allclose(logits_of(model, pixel_values), zero_shot, atol=1e-2)
        return
    torch.testing.assert_close(logits_of(model, pixel_values), zero_shot, atol=1e-4, rtol=0)


FRESH = """
import sys, torch
from clip_prompt_peft import AutoPeftModelForPromptClassification
model = AutoPeftModelForPromptClassification.from_pretrained(sys.argv[1]).eval()
pixel_values, expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(pixel_values=pixel_values).logits, expected)
assert not any(name.startswith("clip_prompt_peft.data") for name in sys.modules)
"""


@pytest.mark.slow
def test_one_line_loads_it_in_a_fresh_process(pixel_values, tmp_path):
    for name in ("clap", "tip-adapter"):
        folder = tmp_path / name
        model = headed(name)
        model.save_pretrained(folder)
        torch.save((pixel_values, logits_of(model, pixel_values)), folder / "expected.pt")
        done = subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_by_every_way(name, pixel_values, tmp_path, zero_shot):
    model = headed(name)
    if name == "2sfs":
        tuned_text = logits_of(model, pixel_values)
        start_class_head(model)
        torch.testing.assert_close(logits_of(model, pixel_values), tuned_text, atol=1e-4, rtol=0)
        as_if_trained(model)
    expected = logits_of(model, pixel_values)
    assert not torch.allclose(expected, zero_shot, atol=1e-2)
    model.save_pretrained(tmp_path)
    ways = [
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path),
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path, low_cpu_mem_usage=True),
        AutoModelForPromptClassification.from_pretrained(tmp_path),
        PeftModel.from_pretrained(new_classifier(), tmp_path),
    ]
    for loaded in ways:
        assert torch.equal(logits_of(loaded.eval(), pixel_values), expected)
        assert loaded.class_names == CLASS_NAMES
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, pixel_values), zero_shot, atol=1e-4, rtol=0)
    assert torch.equal(logits_of(copy.deepcopy(model), pixel_values), expected)
    torch.testing.assert_close(logits_of(model.unload(), pixel_values), zero_shot, atol=1e-4, rtol=0)


def test_a_model_without_a_place_for_it_is_refused(clip, tmp_path):
    with pytest.raises(TypeError, match=r"CLIPModel has no place for it.*from_base"):
        get_peft_model(clip, ClassHeadConfig(class_names=CLASS_NAMES))
    headed("zs-lp").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"AutoPeftModelForPromptClassification.from_pretrained"):
        PeftModel.from_pretrained(clip, tmp_path)
    with pytest.raises(ValueError, match="needs class names"):
        get_peft_model(CLIPForPromptClassification.from_pretrained(TINY_CLIP), ClassHeadConfig())
    prompted = get_peft_model(new_classifier(), CLIPPromptTuningConfig()).get_base_model()
    with pytest.raises(ValueError, match="holds prompts"):
        get_peft_model(prompted, ClassHeadConfig(), adapter_name="head")


def test_heads_are_switched_mixed_and_deleted(pixel_values, zero_shot):
    model = headed("2sfs", adapter_name="one")
    start_class_head(model)
    one = logits_of(model, pixel_values)
    base = model.get_base_model()
    base.set_class_names(["owl", "sun", "rain"])
    model.add_adapter("two", method_config("clap", base, class_names=["owl", "sun", "rain"]))
    base.set_class_names(CLASS_NAMES)
    model.set_adapter("two")
    assert model.class_names == ["owl", "sun", "rain"] and list(model.config.id2label.values()) == model.class_names
    two = logits_of(trained(model, seed=1), pixel_values)
    with model.disable_adapter():
        assert list(model.config.id2label.values()) == CLASS_NAMES
        torch.testing.assert_close(logits_of(model, pixel_values), zero_shot, atol=1e-4, rtol=0)
    model.set_adapter("one")
    torch.testing.assert_close(logits_of(model, pixel_values), one, atol=1e-4, rtol=0)
    mixed = model(pixel_values=pixel_values, adapter_names=["two", "one", "__base__"]).logits
    for found, expected in zip(mixed, (two[0], one[1], zero_shot[2])):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert model.active_adapters == ["one"]
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    torch.testing.assert_close(logits_of(model, pixel_values), two, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_transformers_adds_switches_disables_and_loads_heads(pixel_values, zero_shot, tmp_path):
    classifier = new_classifier().eval()
    classifier.add_adapter(ClassHeadConfig(target_modules="block-layernorms"), "one")
    as_if_trained(classifier).eval()
    one = logits_of(classifier, pixel_values)
    classifier.add_adapter(ClassHeadConfig(class_names=["owl", "sun"]), "two")
    assert classifier.class_names == ["owl", "sun"] and classifier.config.id2label == {0: "owl", 1: "sun"}
    expected = logits_of(new_classifier(["owl", "sun"]).eval(), pixel_values)
    torch.testing.assert_close(logits_of(classifier, pixel_values), expected, atol=1e-4, rtol=0)
    classifier.disable_adapters()
    torch.testing.assert_close(logits_of(classifier, pixel_values), zero_shot, atol=1e-4, rtol=0)
    classifier.enable_adapters()
    classifier.set_adapter("one")
    assert torch.equal(logits_of(classifier, pixel_values), one)
    classifier.save_pretrained(tmp_path)
    loaded = new_classifier().eval()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits_of(loaded, pixel_values), one)
    changed(tmp_path, add={"base_model.model.text_projection.weight": torch.zeros(128, 128)})
    with pytest.raises(ValueError, match="no part of"):
        new_classifier().load_adapter(tmp_path)


def test_it_cannot_be_merged():
    model = headed("2sfs")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged.*export_classifier"):
            merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["clap", "tip-adapter-f"])
def test_known_classes_have_their_rows_and_others_the_text_tower(name, pixel_values):
    model = headed(name)
    tuned = logits_of(model, pixel_values)
    model.set_class_names(["vehicle", "owl", "animal"])
    logits = logits_of(model, pixel_values)
    torch.testing.assert_close(logits[:, [0, 2]], tuned[:, [3, 0]], atol=1e-4, rtol=0)
    expected = logits_of(new_classifier(["owl"]).eval(), pixel_values)
    torch.testing.assert_close(logits[:, [1]], expected, atol=1e-4, rtol=0)
    model.set_class_names(["owl", "sun"])
    expected = logits_of(new_classifier(["owl", "sun"]).eval(), pixel_values)
    torch.testing.assert_close(logits_of(model, pixel_values), expected, atol=1e-4, rtol=0)


def test_an_adapter_that_brings_other_classes_is_told(tmp_path):
    headed("zs-lp").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"brings class names of its own.*2 new.*set_class_names"):
        PeftModel.from_pretrained(new_classifier(["animal", "plant"]), tmp_path)
    with pytest.warns(UserWarning, match="trained on other weights"):
        other = new_classifier()
        other.text_projection.weight.data *= 1.5
        PeftModel.from_pretrained(other, tmp_path)


# Files


def test_the_card_says_what_it_is_and_nan_is_not_saved(tmp_path):
    model = headed("tip-adapter")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "12 keys of training images, alpha 1, beta 1" in card.text and "`vehicle`" in card.text
    assert "class-head" in card.data.tags and card.data.get("library_name") == "peft"
    model = headed("zs-lp")
    model.get_base_model().class_head.ln_tuning_head["default"].class_embeds.data[0] = torch.nan
    with pytest.raises(ValueError, match="not saved.*class_embeds' holds NaN"):
        model.save_pretrained(tmp_path)


def changed(folder, add=(), drop=(), **values):
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: value for name, value in tensors.items() if not name.endswith(tuple(drop) or ("-",))}
    for name in tensors:
        for end, value in values.items():
            if name.endswith(end):
                tensors[name] = value(tensors[name])
    save_file({**tensors, **dict(add)}, folder / WEIGHTS)


HEAD = "base_model.model.class_head.ln_tuning_head."
LAYER = "base_model.model.vision_model."
HOSTILE = {
    "a frozen weight": ({"add": {"base_model.model.text_projection.weight": torch.zeros(128, 128)}}, "no part of"),
    "a wrapped module": ({"add": {LAYER + "post_layernorm.base_layer.weight": torch.zeros(128)}}, "no part of"),
    "a LayerNorm that is not named": (
        {"add": {LAYER + "post_layernorm.ln_tuning_layers.weight": torch.zeros(128)}},
        "does not ask for",
    ),
    "another tensor of the head": ({"add": {HEAD + "bias": torch.zeros(4)}}, "does not ask for"),
    "no keys": ({"drop": ["keys"]}, "hold no .*keys"),
    "labels out of range": ({"labels": lambda labels: labels + 1}, "no indices of its 4 classes"),
    "labels of another type": ({"labels": lambda labels: labels.int()}, "int32"),
    "NaN": ({"keys": lambda keys: keys * torch.nan}, "NaN, Inf"),
    "more keys": ({"keys": lambda keys: keys.repeat(2, 1)}, "has shape"),
    "rows of another width": ({"class_embeds": lambda rows: rows[:, :64].clone()}, "has shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case, tmp_path):
    headed("tip-adapter").save_pretrained(tmp_path)
    changes, message = HOSTILE[case]
    changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path)


def test_a_hostile_configuration_is_refused(tmp_path):
    headed("2sfs").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for fields, message in (
        ({"target_modules": ".*fc1"}, "LayerNorms only, but .*fc1' is a Linear"),
        ({"target_modules": "nothing"}, "names no LayerNorm"),
        ({"embed_width": 64}, "rows of 64 values"),
        ({"embed_width": None}, "does not ask for|hold no|Unexpected|rows"),
        ({"class_names": None}, "names no classes"),
        ({"modules_to_save": ["text_projection"]}, "modules_to_save"),
        ({"format_version": 99}, "install a newer version"),
        ({"num_keys": 2**40}, "num_keys"),
        ({"alpha": "1"}, "alpha"),
    ):
        change_config(tmp_path, **{**config, **fields})
        if fields == {"embed_width": None}:
            continue  # a new adapter, whose tensors are then those of the file
        with pytest.raises(ValueError, match=message):
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path)


def test_a_configuration_of_saved_weights_cannot_start_a_new_head(pixel_values, tmp_path):
    model = headed("zs-lp")
    model.save_pretrained(tmp_path)
    config = ClassHeadConfig.from_pretrained(tmp_path)
    new = get_peft_model(new_classifier(), config).eval()
    with pytest.raises(ValueError, match="belongs to saved weights, but none were loaded"):
        logits_of(new, pixel_values)


# Precision, other methods, other families


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_bfloat16_and_under_autocast(name, pixel_values, labels):
    model = headed(name, new_classifier(dtype=torch.bfloat16)).train()
    parameters = [value for value in model.parameters() if value.requires_grad]
    assert {value.dtype for value in parameters} <= {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pixel_values=pixel_values.bfloat16(), labels=labels)
    assert torch.isfinite(out.loss)
    if name != "tip-adapter":
        out.loss.backward()
        assert all(torch.isfinite(value.grad).all() for value in parameters if value.grad is not None)
        assert any(value.grad is not None for value in parameters)
    model.eval()(pixel_values=pixel_values.bfloat16())


def test_it_starts_from_a_text_tower_with_lora(pixel_values):
    base = as_if_trained(get_peft_model(new_classifier(), LoraConfig(target_modules=["q_proj"]))).get_base_model()
    tuned = logits_of(base.eval(), pixel_values)
    model = get_peft_model(base, ClassHeadConfig(), adapter_name="head").eval()
    torch.testing.assert_close(logits_of(model, pixel_values), tuned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["Siglip", pytest.param("ChineseCLIP", marks=pytest.mark.slow)])
def test_other_families_have_heads(family, tmp_path):
    family = FAMILIES[family]
    family.save(tmp_path / "base")
    inputs = family.image_inputs()

    @torch.no_grad()
    def logits(model):
        return model.eval()(**inputs).logits

    names = family.classifier().class_names
    load = AutoModelForPromptClassification.from_pretrained
    zero_shot = logits(load(tmp_path / "base", class_names=names))
    for name in NAMES:
        model = headed(name, load(tmp_path / "base", class_names=names))
        if name == "2sfs":
            layer_norms = [key for key, value in model.named_parameters() if "ln_tuning_layers" in key]
            assert len(layer_norms) == 2 * 3 * 2 * 2 and all(".layer" in key for key in layer_norms)
            start_class_head(model)
        expected = logits(model)
        assert not torch.allclose(expected, zero_shot, atol=1e-3)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits(AutoPeftModelForPromptClassification.from_pretrained(tmp_path / name)), expected)
        torch.testing.assert_close(logits(model.unload()), zero_shot, atol=1e-4, rtol=0)


def test_a_vit_b_16_has_61440_values_in_its_layer_norms():
    from transformers import CLIPConfig, CLIPModel

    from clip_prompt_peft.towers import block_layer_norms

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
    norms = [clip.get_submodule(path) for path in block_layer_norms(clip)]
    assert sum(value.numel() for norm in norms for value in norm.parameters()) == 61_440


@pytest.mark.parametrize("name", ["clap", "2sfs", "tip-adapter"])
def test_a_temperature_is_kept_with_a_head(name, pixel_values, zero_shot, tmp_path):
    model = headed(name)
    expected = logits_of(model, pixel_values) / 2
    model.get_base_model().set_temperature(2.0)
    torch.testing.assert_close(logits_of(model, pixel_values), expected)
    model.save_pretrained(tmp_path)
    assert "by which logits are divided: 2" in (tmp_path / "README.md").read_text()
    loaded = AutoPeftModelForPromptClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, pixel_values), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, pixel_values), zero_shot)
    change_config(tmp_path, temperature=-1)
    with pytest.raises(ValueError, match=r"temperature must be a number from 0\.001 to 1000"):
        AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
