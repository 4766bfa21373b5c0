"""Models, and ways of watching them, for the tests of the class embeddings that are kept."""

import contextlib

import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.text import ClassEncoder


CACHE = "clip_prompt_peft.text.cache"
LORA = {
    "r": 2,
    "target_modules": r"text_model.*(q_proj|fc1)",
    "init_lora_weights": False,
}  # changes the outputs at once


@contextlib.contextmanager
def sizes_as_in_a_real_model():
    """The embedded model is so small that all of its weights would be compared whole: now the position table is, and
    the matrices are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{CACHE}.SMALL", 10_000)
        yield


def new_classifier():
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES).eval()


def prompt_config():
    return CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="RANDOM")


def prompted_classifier():
    """With two adapters, "default" being active."""
    model = get_peft_model(new_classifier(), prompt_config())
    model.add_adapter("other", prompt_config())
    return model.eval()


@torch.no_grad()
def evaluate(model):
    """Class embeddings as an evaluation uses them."""
    return base_of(model).get_class_embeds()


@torch.no_grad()
def compute_anew(model):
    classifier = base_of(model)
    return ClassEncoder(path="plain")(classifier, classifier.class_prompts, classifier.prompt_layout)


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vectors_of(model, name="default"):
    return base_of(model).text_model.embeddings.learnable_embeddings[name]


def assert_up_to_date(model):
    torch.testing.assert_close(evaluate(model), compute_anew(model), rtol=0, atol=1e-5)


def assert_kept(model, runs):
    """The text tower does not run, and the embeddings are right."""
    before = runs.count
    embeds = evaluate(model)
    assert runs.count == before
    torch.testing.assert_close(embeds, compute_anew(model), rtol=0, atol=1e-5)


def values_compared(model):
    """About as many as are held with one result: the adapters and the small tensors of the text side."""
    return sum(p.numel() for p in base_of(model).text_model.parameters() if p.requires_grad or p.numel() <= 10_000)


class CountedRuns:
    """How often the text tower runs within a `with`."""

    def __init__(self, model):
        self.layer, self.count = base_of(model).text_model.encoder.layers[0], 0

    def __enter__(self):
        self.hook = self.layer.register_forward_hook(self.counted)
        return self

    def counted(self, *args):
        self.count += 1

    def __exit__(self, *error):
        self.hook.remove()


def train_steps(model, **optimizer_arguments):
    """Two steps on random images, as a Trainer would make them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **optimizer_arguments)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=torch.randn(4, 3, 48, 48), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    model.eval()
