"""A training step on a device reads no value of it, on any path of the text tower: the host would wait.

On the meta device there are no values to read.
"""

import contextlib

import pytest
import torch
from adapters import base_of, prompted
from cases import new_classifier
from families import Case
from graph_engines import StandIn, captured_of, graphed
from peft import LoraConfig, get_peft_model

from clip_prompt_peft.labels import LabelCheck


NAMES = ["cat", "golden retriever", "lily of the valley", "food"]  # of different lengths


def with_encoder(**settings):
    model = prompted(new_classifier(NAMES))
    vars(base_of(model).class_encoder).update(settings)
    return model


def with_lora(**fields):
    return get_peft_model(new_classifier(NAMES), LoraConfig(target_modules=r"text_model.*(q_proj|fc1)", **fields))


def with_checkpointing():
    model = prompted(new_classifier(NAMES)).train()
    model.gradient_checkpointing_enable()
    return model


def with_captured_encoder():
    engine = StandIn()
    engine.device_type = "meta"
    return graphed(prompted(new_classifier(NAMES)), engine)


MODELS = {
    "packed in chunks": lambda: with_encoder(batch_size=2),
    "cut": lambda: with_encoder(path="cut"),
    "cut in chunks": lambda: with_encoder(path="cut", batch_size=2),
    "chunks of vectors of each class": lambda: prompted(new_classifier(NAMES), class_specific=True),
    "chunks for each image": lambda: prompted(new_classifier(NAMES), image_conditioned=True),
    "class name in front": lambda: prompted(new_classifier(NAMES), class_token_position="front"),
    "lora with dropout": lambda: with_lora(lora_dropout=0.1),
    "dora": lambda: with_lora(use_dora=True),
    "gradient checkpointing": with_checkpointing,
    "a tower that reads its padding": lambda: Case("Siglip").prompted("coop"),
    "another causal tower": lambda: Case("MetaClip2").prompted("coop"),
    "captured": with_captured_encoder,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_reads_no_value_of_the_device(kind, monkeypatch):
    model = MODELS[kind]()
    classifier = base_of(model)
    if kind.startswith("chunks"):
        classifier.class_encoder.batch_size = 2
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()
    )  # which has no meta device
    classifier.label_check = LabelCheck(at_once_on=("cpu",))
    inputs = {"image_embeds": torch.zeros(3, classifier.embed_width), "labels": torch.zeros(3, dtype=torch.long)}
    model.train().to("meta")
    for _ in range(2):
        model(**{name: value.to("meta") for name, value in inputs.items()}).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert kind != "captured" or captured_of(model).num_replays == 2
