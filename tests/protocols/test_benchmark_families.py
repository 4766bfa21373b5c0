"""The protocols with a tiny model of every family."""

import numpy as np
import pytest
import torch
from conftest import EMOJI, slow_param
from families import FAMILIES
from peft import LoraConfig, get_peft_model

from clip_prompt_peft.data import load_image_dataset
from clip_prompt_peft.protocols import Backbone, Benchmark, Results, TrainingSettings, few_shot_curve
from clip_prompt_peft.protocols.image_set import ImagePool
from clip_prompt_peft.protocols.methods import find_method, lora_targets


METHODS = ["zero-shot", "ensemble", "linear-probe", "lora", "prompt-tuning", "coop", "vpt-deep", "promptsrc"]
SOME = ["CLIP", "Siglip", "ChineseCLIP"]


def backbone_of(name, **settings):
    family = FAMILIES[name]
    settings = TrainingSettings(num_train_epochs=1, when_fewer="all", ensemble="imagenet_simple", **settings)
    return Backbone(family.classifier(), family.image_processor, settings)


@pytest.fixture(scope="module")
def icons():
    files = {split: str(EMOJI / f"noto-{split}.parquet") for split in ("train", "test")}
    splits = load_image_dataset(files=files)
    splits["test"] = splits["test"].select(range(0, 260, 20))
    return splits


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_is_trained_and_tested(name, icons, tmp_path):
    backbone = backbone_of(name)
    results = Results(tmp_path, backbone.settings.fingerprint(name))
    runs = few_shot_curve("noto", METHODS, shots=(1,), seeds=(1,))
    Benchmark(lambda: backbone, {"noto": icons}, results).run(runs)
    for run in runs:
        assert 0 <= results.metrics(run, "noto")["accuracy"] <= 1
        assert len(results.predictions(run, "noto").labels) == len(icons["test"])


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_trains_both_towers(name):
    backbone = backbone_of(name)
    model = get_peft_model(backbone.model, LoraConfig(r=2, target_modules=lora_targets(backbone.model)))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    for tower, layers in (("text_model", 3), ("vision_model", 3)):
        assert sum(tower in key for key in trained) == layers * 3 * 2  # query, key and value; A and B


def test_lora_refuses_a_tower_that_it_would_leave_alone():
    backbone = backbone_of("CLIP")
    for layer in backbone.model.text_model.encoder.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="text_model of CLIPForPromptClassification has none"):
        lora_targets(backbone.model)


@pytest.mark.parametrize("name", [SOME[0], *map(slow_param, SOME[1:])])
@pytest.mark.parametrize("method", ["prompt-tuning", slow_param("lora"), "zero-shot"])
def test_every_module_keeps_its_training_mode(name, method, icons):
    backbone = backbone_of(name)
    backbone.model.train().vision_model.eval()
    before = {key: module.training for key, module in backbone.model.named_modules()}
    train, test = ImagePool(icons["train"]).few_shot(1, seed=1), ImagePool(icons["test"]).classes()
    with find_method(method).fit(backbone, train, 1) as fitted:
        assert np.isfinite(fitted.score(test)).all()
    assert {key: module.training for key, module in backbone.model.named_modules()} == before
