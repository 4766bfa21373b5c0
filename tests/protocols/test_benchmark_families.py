"""The protocols with a tiny model of every family."""

import numpy as np
import pytest
from conftest import EMOJI, slow_param
from families import FAMILIES, takes

from clip_prompt_peft.data import load_image_dataset
from clip_prompt_peft.protocols import Backbone, Benchmark, Results, TrainingSettings, few_shot_curve
from clip_prompt_peft.protocols.image_set import ImagePool
from clip_prompt_peft.protocols.methods import find_method


METHODS = ["zero-shot", "ensemble", "linear-probe", "clip-lora", "prompt-tuning", "coop", "vpt-deep", "promptsrc"]
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
    runs = few_shot_curve("noto", [method for method in METHODS if takes(name, method)], shots=(1,), seeds=(1,))
    Benchmark(lambda: backbone, {"noto": icons}, results).run(runs)
    for run in runs:
        assert 0 <= results.metrics(run, "noto")["accuracy"] <= 1
        assert len(results.predictions(run, "noto").labels) == len(icons["test"])


@pytest.mark.parametrize("name", [SOME[0], *map(slow_param, SOME[1:])])
@pytest.mark.parametrize("method", ["prompt-tuning", slow_param("clip-lora"), "zero-shot"])
def test_every_module_keeps_its_training_mode(name, method, icons):
    backbone = backbone_of(name)
    backbone.model.train().vision_model.eval()
    before = {key: module.training for key, module in backbone.model.named_modules()}
    train, test = ImagePool(icons["train"]).few_shot(1, seed=1), ImagePool(icons["test"]).classes()
    with find_method(method).fit(backbone, train, 1) as fitted:
        assert np.isfinite(fitted.score(test)).all()
    assert {key: module.training for key, module in backbone.model.named_modules()} == before
