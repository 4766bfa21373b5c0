"""Many prompt adapters on one frozen CLIP, and batches whose images belong to different ones."""

import copy
import dataclasses
import re
import runpy
import sys

import pytest
import torch
from adapters import learnable
from conftest import CLASS_NAMES, ROOT
from peft import PeftModel, get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


CLASSES_OF = {"pets": ["cat", "dog"], "meals": ["cake", "pizza", "bread"], "zoo": ["lion", "owl"]}


@pytest.fixture
def tuned(classifier):
    """Three adapters with random vectors: two, and a third with as many classes as the first."""
    configs = {
        name: CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=4, class_names=class_names)
        for name, class_names in CLASSES_OF.items()
    }
    model = get_peft_model(classifier, configs.pop("pets"), adapter_name="pets")
    for name, config in configs.items():
        model.add_adapter(name, config)
    return model.eval()


def logits_of(model, name, pixel_values):
    model.set_adapter(name)
    return model(pixel_values=pixel_values).logits


def count_images(module, counts):
    module.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )


def test_each_image_is_scored_by_its_own_adapter(tuned, classifier, pixel_values):
    with tuned.disable_adapter():
        zero_shot = tuned(pixel_values=pixel_values).logits
    mixed = tuned(pixel_values=pixel_values, adapter_names=["meals", "__base__", "pets"]).logits
    assert [len(logits) for logits in mixed] == [3, len(CLASS_NAMES), 2]
    torch.testing.assert_close(mixed[0], logits_of(tuned, "meals", pixel_values)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], zero_shot[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[2], logits_of(tuned, "pets", pixel_values)[2], rtol=0, atol=1e-5)


def test_adapters_with_the_same_classes_give_one_tensor(tuned, pixel_values):
    tuned.add_adapter(
        "pets2", CLIPPromptTuningConfig(class_names=CLASSES_OF["pets"], prompt_template="a drawing of a {}.")
    )
    mixed = tuned(pixel_values=pixel_values, adapter_names=["pets", "pets2", "pets"]).logits
    assert mixed.shape == (3, 2)
    torch.testing.assert_close(mixed[1], logits_of(tuned, "pets2", pixel_values)[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[[0, 2]], logits_of(tuned, "pets", pixel_values)[[0, 2]], rtol=0, atol=1e-5)


def test_classes_of_the_same_number_but_other_names_give_a_list(tuned, pixel_values):
    mixed = tuned(pixel_values=pixel_values, adapter_names=["pets", "zoo", "pets"]).logits
    assert isinstance(mixed, list)
    assert [tuple(logits.shape) for logits in mixed] == [(2,)] * 3


def test_all_images_go_through_the_image_tower_at_once(tuned, classifier, pixel_values):
    counts = []
    count_images(classifier.vision_model, counts)
    tuned(pixel_values=pixel_values, adapter_names=["meals", "zoo", "pets"])
    assert counts == [3]


def test_image_embeddings_do_as_well(tuned, classifier, pixel_values):
    names = ["meals", "zoo", "pets"]
    embeds = classifier.get_image_features(pixel_values).pooler_output
    for from_embeds, from_pixels in zip(
        tuned(image_embeds=embeds, adapter_names=names).logits,
        tuned(pixel_values=pixel_values, adapter_names=names).logits,
    ):
        torch.testing.assert_close(from_embeds, from_pixels)


@pytest.mark.parametrize("module_name", ["text_projection", "visual_projection"])
def test_modules_that_an_adapter_saves_act_on_its_own_images_only(classifier, pixel_values, module_name):
    config = CLIPPromptTuningConfig(modules_to_save=[module_name])
    model = get_peft_model(classifier, config, adapter_name="one")
    model.add_adapter("two", CLIPPromptTuningConfig(modules_to_save=[module_name]))
    with torch.no_grad():
        getattr(classifier, module_name).modules_to_save["two"].weight.normal_(std=0.1)
    with model.disable_adapter():
        zero_shot = model(pixel_values=pixel_values).logits
    mixed = model.eval()(pixel_values=pixel_values, adapter_names=["two", "one", "__base__"]).logits
    torch.testing.assert_close(mixed[0], logits_of(model, "two", pixel_values)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1:], zero_shot[1:], rtol=0, atol=1e-5)
    assert (mixed[0] - zero_shot[0]).abs().max() > 0.1


def test_adapters_of_any_kind_share_a_batch(classifier, pixel_values):
    """Prompts in the image tower, of every class, and conditioned on the image: each acts on its own images only."""
    names = ["kgcoop", "coop-csc", "cocoop", "vpt-deep", "maple"]
    model = None
    for name in names:
        config = CLIPPromptTuningConfig.from_preset(name, classifier, regularizer=None)
        if model is None:
            model = get_peft_model(classifier, config, adapter_name=name).eval()
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for vectors in learnable(model).values():
            vectors += 0.1 * torch.randn_like(vectors)
    images = pixel_values.repeat(4, 1, 1, 1)  # (12, 3, H, W)
    batch = [*names, "__base__", *reversed(names), "__base__"]
    mixed = model(pixel_values=images, adapter_names=batch).logits
    with model.disable_adapter():
        separate = {"__base__": model(pixel_values=images).logits}
    separate |= {name: logits_of(model, name, images) for name in names}
    expected = torch.stack([separate[name][row] for row, name in enumerate(batch)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert min((separate[name] - separate["__base__"]).abs().max() for name in names) > 0.01


def test_the_active_adapter_and_what_is_trained_stay_as_they_are(tuned, pixel_values):
    tuned.set_adapter("zoo")
    before = logits_of(tuned, "zoo", pixel_values)
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    tuned(pixel_values=pixel_values, adapter_names=["meals", "__base__", "pets"])
    assert tuned.active_adapter == "zoo"
    assert [name for name, parameter in tuned.named_parameters() if parameter.requires_grad] == trainable
    assert torch.equal(tuned(pixel_values=pixel_values).logits, before)


def test_an_error_in_between_leaves_the_active_adapter(tuned, pixel_values):
    before = logits_of(tuned, "zoo", pixel_values)
    layouts = tuned.get_base_model().text_embeddings.prompt_layouts
    layouts["meals"] = dataclasses.replace(layouts["meals"], class_names=["very " * 80 + "long"])
    with pytest.raises(ValueError, match="77 positions"):
        tuned(pixel_values=pixel_values, adapter_names=["pets", "meals", "zoo"])
    assert torch.equal(tuned(pixel_values=pixel_values).logits, before)


def test_while_adapters_are_disabled_every_image_gets_the_zero_shot_logits(tuned, pixel_values):
    with tuned.disable_adapter():
        zero_shot = tuned(pixel_values=pixel_values).logits
        mixed = tuned(pixel_values=pixel_values, adapter_names=["meals", "zoo", "pets"]).logits
    torch.testing.assert_close(mixed, zero_shot)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["pets", "zoo"], ValueError, "2 names for 3 images"),
        (["pets", "zoo", "birds"], ValueError, r"no adapter 'birds'; loaded are \['meals', 'pets', 'zoo'\]"),
        ("zoo", TypeError, "a list with one name for each image"),
        (["pets", "zoo", None], TypeError, "a list with one name for each image"),
    ],
)
def test_names_that_cannot_be_are_refused(tuned, pixel_values, names, error, message):
    with pytest.raises(error, match=message):
        tuned(pixel_values=pixel_values, adapter_names=names)


def test_a_batch_without_images_is_refused(tuned, pixel_values):
    with pytest.raises(ValueError, match="empty"):
        tuned(pixel_values=pixel_values[:0], adapter_names=[])
    with pytest.raises(ValueError, match="got neither"):
        tuned(adapter_names=["pets"])


def test_training_merged_adapters_and_other_base_models_are_refused(tuned, clip, pixel_values):
    with pytest.raises(ValueError, match="call model.eval()"):
        tuned.train()(pixel_values=pixel_values, adapter_names=["pets"] * 3)
    tuned.eval().merge_adapter(["pets"])
    with pytest.raises(ValueError, match=r"merged \(\['pets'\]\)"):
        tuned(pixel_values=pixel_values, adapter_names=["pets"] * 3)
    with pytest.raises(TypeError, match="base model is a CLIPModel"):
        get_peft_model(clip, CLIPPromptTuningConfig())(pixel_values=pixel_values, adapter_names=["default"] * 3)


def test_dozens_of_adapters_share_one_base_and_answer_by_name(classifier, pixel_values, tmp_path):
    names = [f"adapter-{i}" for i in range(24)]
    expected = {}
    for name in names:
        config = CLIPPromptTuningConfig(
            prompt_tuning_init="RANDOM", num_virtual_tokens=4, class_names=[f"{name} cat", f"{name} dog"]
        )
        model = get_peft_model(classifier, config)
        expected[name] = model.eval()(pixel_values=pixel_values[:1]).logits[0].detach()
        model.save_pretrained(tmp_path / name)
        classifier = model.unload()
    tables = {parameter.data_ptr() for parameter in classifier.parameters()}

    model = PeftModel.from_pretrained(classifier, tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, name)
    added = [parameter for parameter in model.parameters() if parameter.data_ptr() not in tables]
    assert sum(parameter.numel() for parameter in added) == 24 * 4 * classifier.config.text_config.hidden_size
    mixed = model(pixel_values=pixel_values[:1].expand(24, -1, -1, -1), adapter_names=names).logits
    for name, logits in zip(names, mixed):
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-5)


def test_weights_are_read_to_the_device_of_the_model_and_not_to_a_card_that_it_is_not_on(
    tuned, clip, tmp_path, monkeypatch
):
    tuned.save_pretrained(tmp_path)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    for base in (clip, copy.deepcopy(tuned).unload()):
        model = PeftModel.from_pretrained(base, tmp_path / "pets")
        model.load_adapter(tmp_path / "zoo", "zoo")
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with pytest.raises(Exception, match="(?i)cuda"):
        model.load_adapter(tmp_path / "zoo", "another", torch_device="cuda")


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks_on_path")
def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    script = ROOT / "benchmarks" / "many_adapters.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--num_adapters", "6", "--batch_size", "3"])
    runpy.run_path(str(script), run_name="__main__")
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", capsys.readouterr().out, re.MULTILINE))
    assert "3 images of 3 adapters, one by one" in rows
    assert rows["memory of the process above the base"].endswith(" MB")
    assert rows["switching to another adapter"].endswith(" µs")
    assert float(rows["largest difference between their logits"]) < 1e-5
