"""Engines for captured class encoders, and models that use them."""

import copy
import time

import torch
from adapters import as_if_trained, base_of, prompted
from cases import new_classifier
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.text.graph import NUM_WARM_UPS, CudaEngine, GraphedEncoder


NAMES = ["cat", "golden retriever", "lily of the valley", "food"]
OTHER_NAMES = ["dog", "Boeing 737-800", "x-ray image", "a very long name of a class"]


class StandIn:
    """
    Does on a CPU what a captured CUDA graph does: every replay writes into the same results, and reads what the last
    replays have left behind.
    """

    device_type = "cpu"

    def __init__(self):
        self.num_replays, self.num_given_back = 0, 0
        self.delay = 0.0  # seconds of a replay in which other threads run

    def capture(self, device, functions, forget):
        for function in functions:
            function()
        forget()
        return [self._replayable(function) for function in functions]

    def _replayable(self, function):
        results = [result.detach().clone() for result in function()]

        def replay():
            self.num_replays += 1
            time.sleep(self.delay)
            with torch.enable_grad():
                values = function()
            for old, new in zip(results, values):
                old.data.copy_(new)

        return results, replay

    def give_back(self):
        self.num_given_back += 1


class Watched:
    """An engine that counts its captures, and fails where it is told to."""

    def __init__(self, engine):
        self.engine, self.device_type = engine, engine.device_type
        self.num_captures, self.error, self.num_given_back = 0, None, 0

    def capture(self, device, functions, forget):
        self.num_captures += 1
        if self.error is None:
            return self.engine.capture(device, functions, forget)

        num_calls = 0

        def failing():
            nonlocal num_calls
            num_calls += 1
            if num_calls > (NUM_WARM_UPS if self.device_type == "cuda" else 1):  # in the capture itself
                raise self.error
            return functions[1]()

        return self.engine.capture(device, (functions[0], failing), forget)

    def give_back(self):
        self.num_given_back += 1
        self.engine.give_back()


def engine_for(device):
    return Watched(CudaEngine() if torch.device(device).type == "cuda" else StandIn())


def graphed(model, engine=None, cuda_graph=True):
    """The model, in training mode, with class embeddings from captured graphs."""
    encoder = base_of(model).class_encoder
    encoder.cuda_graph = cuda_graph
    encoder._graphs = GraphedEncoder(engine_for(base_of(model).device) if engine is None else engine)
    return model.train()


def engine_of(model):
    return base_of(model).class_encoder._graphs.engine


def captured_of(model):
    return base_of(model).class_encoder._graphs._captured


def eager_twin(model):
    """A copy that computes class embeddings in the ordinary way."""
    twin = copy.deepcopy(model)
    base_of(twin).class_encoder.cuda_graph = False
    return twin


def batch_for(model, seed=0, size=3):
    """Image embeddings and labels."""
    classifier = base_of(model)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(size, classifier.embed_width, generator=generator)
    labels = torch.randint(len(classifier.class_names), (size,), generator=generator)
    return {"image_embeds": embeds.to(classifier.device, classifier.dtype), "labels": labels.to(classifier.device)}


def gradients_of(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def step(model, optimizer=None, autocast=None, **inputs):
    """The logits and the gradients of a step."""
    inputs = inputs or batch_for(model)
    model.zero_grad()
    device_type = base_of(model).device.type
    with torch.autocast(device_type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(**inputs, return_loss_terms=True)
    output.loss.backward()
    gradients = gradients_of(model)
    if optimizer is not None:
        optimizer.step()
    return output.logits.detach(), gradients


def assert_same_results(found, expected, device, tolerance=1e-6, to_the_bit=True):
    """To the bit with the stand-in; on a card, to `tolerance` of the largest value."""
    for one, another in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        if another is None or (torch.device(device).type == "cpu" and to_the_bit):
            assert one is another is None or torch.equal(one, another)
        else:
            torch.testing.assert_close(one, another, rtol=0, atol=tolerance * float(another.abs().max()) + 1e-12)


def assert_as_eager(model, twin=None, tolerance=1e-6, **options):
    """A step is that of a model in the ordinary way."""
    twin = eager_twin(model) if twin is None else twin
    expected = step(twin, **options)
    assert_same_results(step(model, **options), expected, base_of(model).device, tolerance)


def prompts_on(place, **fields):
    return graphed(as_if_trained(prompted(new_classifier(NAMES), **fields)).to(place))


def lora_on(place, **fields):
    config = LoraConfig(r=2, target_modules=r"text_model.*(q_proj|fc1)|text_projection", **fields)
    return graphed(as_if_trained(get_peft_model(new_classifier(NAMES), config)).to(place))


def lora_beside_prompts_on(place):
    classifier = new_classifier(NAMES)
    model = prompted(classifier)
    classifier.add_adapter(LoraConfig(r=2, target_modules=r"text_model.*q_proj"), adapter_name="lora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "learnable" in name)
    return graphed(as_if_trained(model).to(place))


def positions_on(place):
    classifier = new_classifier(NAMES).requires_grad_(False)
    classifier.text_model.embeddings.position_embedding.requires_grad_(True)
    return graphed(classifier.to(place))


def both(model):
    """The model, and one in the ordinary way."""
    return model, eager_twin(model)


def other_adapter():
    return CLIPPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDOM")


def eager_embeds(model):
    encoder = base_of(model).class_encoder
    encoder.cuda_graph, setting = False, encoder.cuda_graph
    try:
        return base_of(model).get_class_embeds()
    finally:
        encoder.cuda_graph = setting
