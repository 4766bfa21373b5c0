"""Models, and ways of watching and comparing them, for the tests of class embeddings."""

from unittest import mock

import torch
from adapters import base_of, prompted
from cases import new_classifier

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.text import ClassEncoder


CACHE = "clip_prompt_peft.text.cache"
LORA = {
    "r": 2,
    "target_modules": r"text_model.*(q_proj|fc1)",
    "init_lora_weights": False,
}  # changes the outputs at once


def prompt_config():
    return CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="RANDOM")


def prompted_classifier():
    """With two adapters, "default" being active."""
    model = prompted(new_classifier())
    model.add_adapter("other", prompt_config())
    return model.eval()


def embeds_and_gradients(model, image_embeds=None, **settings):
    """Class embeddings with these settings of the encoder, and the gradients of a fixed loss on them."""
    classifier = base_of(model)
    for name, value in {"path": "auto", "batch_size": "auto", **settings}.items():
        setattr(classifier.class_encoder, name, value)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    embeds = classifier.get_class_embeds(image_embeds)  # (C, E) or (B, C, E)
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((embeds * weights).sum(), parameters, allow_unused=True)
    return embeds.detach(), gradients


def assert_same(results, expected, tolerance=1e-5):
    """Compares what `embeds_and_gradients` gives, each tensor relative to its largest value."""
    for actual, wanted in zip((results[0], *results[1]), (expected[0], *expected[1])):
        if wanted is not None:
            assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()
        else:
            assert actual is None


@torch.no_grad()
def evaluate(model):
    """Class embeddings as an evaluation uses them."""
    return base_of(model).get_class_embeds()


@torch.no_grad()
def compute_anew(model):
    classifier = base_of(model)
    return ClassEncoder(path="plain")(classifier, classifier.class_prompts, classifier.prompt_layout)


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
    """How often the text tower runs within a `with`, without a hook: with one, the classifier keeps nothing."""

    def __init__(self, model):
        self.layer, self.count = base_of(model).text_model.encoder.layers[0], 0

    def __enter__(self):
        layer_class = type(self.layer)
        forward = layer_class.forward

        def counted(layer, *args, **kwargs):
            self.count += layer is self.layer
            return forward(layer, *args, **kwargs)

        self.patch = mock.patch.object(layer_class, "forward", counted)
        self.patch.start()
        return self

    def __exit__(self, *error):
        self.patch.stop()


def train_steps(model, **optimizer_arguments):
    """Two steps on random images, as a Trainer would make them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **optimizer_arguments)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=torch.randn(4, 3, 48, 48), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    model.eval()
