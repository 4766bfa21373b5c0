"""PromptKD in the protocols: which images and names the student sees, of the classes that count as new."""

import numpy as np
import pytest
import torch
from conftest import EMOJI, TINY_CLIP
from transformers import AutoImageProcessor

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.data import load_image_dataset
from clip_prompt_peft.protocols import Backbone, TrainingSettings, find_method
from clip_prompt_peft.protocols import methods as module
from clip_prompt_peft.protocols.image_set import ImagePool


@pytest.fixture(scope="module")
def pool():
    dataset = load_image_dataset(files={"train": str(EMOJI / "fluenthc-train.parquet")})["train"]
    rows = [row for label in range(4) for row in np.flatnonzero(np.array(dataset["label"][:]) == label)[:5]]
    return ImagePool(dataset.select(rows))


@pytest.fixture
def backbone():
    settings = TrainingSettings(num_train_epochs=1, batch_size=8, when_fewer="all")
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    return Backbone(model, AutoImageProcessor.from_pretrained(TINY_CLIP), settings)


@pytest.mark.parametrize(("name", "num_images"), [("promptkd", 10), ("promptkd-transductive", 20)])
def test_new_classes_are_seen_in_training_in_one_of_the_protocols_only(name, num_images, pool, backbone, monkeypatch):
    seen = []
    train_adapter = module.train_adapter

    def recorded(model, backbone, train, seed, name, teacher=None):
        seen.append((name, len(train.rows), model.get_base_model().class_names, teacher is not None))
        train_adapter(model, backbone, train, seed, name, teacher)

    monkeypatch.setattr(module, "train_adapter", recorded)
    label_names = pool.dataset.features["label"].names
    base = pool.few_shot(2, seed=1, label_names=label_names[:2])
    new, everything = pool.classes(label_names[2:4]), pool.classes()
    names = base.class_names if name == "promptkd" else everything.class_names
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    with find_method(name).fit(backbone, base, 1) as fitted:
        assert seen == [("ivlp", 4, base.class_names, False), ("promptkd", num_images, names, True)]
        logits = [fitted.score(images) for images in (new, base, new)]
        assert [found.shape for found in logits] == [(10, 2), (4, 2), (10, 2)]
        np.testing.assert_array_equal(logits[0], logits[2])
        assert fitted.num_bytes > 4 * fitted.num_trainable > 8 * backbone.model.embed_width**2
    assert backbone.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in backbone.model.state_dict().items())
