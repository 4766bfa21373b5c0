"""On a device, as many classes are encoded at once as fit into its memory."""

import contextlib

import pytest
import torch
from conftest import TINY_CLIP
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.text.memory import TowerSize, bytes_of_class, classes_that_fit
from clip_prompt_peft.text.packing import num_shared_positions, tokens_of_class


GIB = 2**30
VIT_B_32 = TowerSize(width=512, inner_width=2048, num_layers=12)
PACKED_TOKENS = 3.9 * (1 + 17 / 160)  # of an ImageNet name behind 16 vectors


@pytest.mark.parametrize("free", [4 * GIB, 100 * GIB])
def test_a_thousand_classes_are_taken_at_once(free):
    assert classes_that_fit(PACKED_TOKENS, 177, VIT_B_32, free) > 1_000


def test_the_bound_of_a_thousand_classes_is_near_what_was_measured():
    measured = 1.6 * GIB  # with packed rows in float32
    assert measured < 1_000 * bytes_of_class(PACKED_TOKENS, 177, VIT_B_32, with_gradients=True) < 1.5 * measured


def test_a_hundred_thousand_classes_are_not_taken_at_once():
    assert 10_000 < classes_that_fit(PACKED_TOKENS, 177, VIT_B_32, 100 * GIB) < 100_000


@pytest.mark.parametrize("num_classes", [10_000, 100_000])
@pytest.mark.parametrize(("num_tokens", "length"), [(PACKED_TOKENS, 177), (26, 26), (77, 77)])
def test_a_chunk_fits(num_classes, num_tokens, length):
    for free in (GIB, 16 * GIB, 100 * GIB):
        chunk = min(num_classes, classes_that_fit(num_tokens, length, VIT_B_32, free))
        assert chunk * bytes_of_class(num_tokens, length, VIT_B_32, with_gradients=True) <= free / 2


def test_more_classes_fit_without_gradients_and_in_half_precision():
    half = TowerSize(width=512, inner_width=2048, num_layers=12, value_bytes=2)
    usual = classes_that_fit(77, 77, VIT_B_32, GIB)
    assert classes_that_fit(77, 77, VIT_B_32, GIB, with_gradients=False) > 5 * usual
    assert classes_that_fit(77, 77, half, GIB) == pytest.approx(2 * usual, abs=1)


def test_one_class_is_always_taken():
    assert classes_that_fit(77, 77, VIT_B_32, free_bytes=0) == 1


def build(num_classes, n=4):
    """A classifier of twelve narrow layers with the proportions of a CLIP."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower, vision_config={**tower, "num_hidden_layers": 1, "image_size": 16}, projection_dim=16
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    names = [f"cat {number}" for number in range(num_classes)]
    classifier = CLIPForPromptClassification.from_base(CLIPModel(config).requires_grad_(False), tokenizer, names)
    template = " ".join(["X"] * n) + " {}."
    settings = {"prompt_tuning_init": "RANDOM", "prompt_template": template}
    return get_peft_model(classifier, CLIPPromptTuningConfig(num_virtual_tokens=n, **settings)).get_base_model()


def kept_by_autograd(classifier):
    weights = {parameter.untyped_storage().data_ptr() for parameter in classifier.parameters()}
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        classifier.get_class_embeds()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def frozen_casts(classifier):
    """Bytes of the weights that autocast casts, which do not grow with the number of classes."""
    return 2 * sum(p.numel() for p in classifier.text_model.encoder.parameters())


@pytest.mark.parametrize("path", ["packed", "cut", "plain"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "is_cast"), [("float32", False), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize(("num_classes", "n"), [(40, 4), (130, 16)])
def test_it_is_an_upper_bound_of_what_autograd_keeps(path, attention, dtype, is_cast, num_classes, n):
    classifier = build(num_classes, n).to(getattr(torch, dtype))
    classifier.set_attn_implementation(attention)
    classifier.class_encoder.path, classifier.class_encoder.batch_size = path, None
    with torch.autocast("cpu", torch.bfloat16) if is_cast else contextlib.nullcontext():
        size = TowerSize.of(classifier, is_trained=False)
        kept = kept_by_autograd(classifier) - (frozen_casts(classifier) if is_cast else 0)
    prompts, layout = classifier.class_prompts, classifier.prompt_layout
    tokens = tokens_of_class(path, prompts, num_shared_positions(prompts, layout))
    bound = num_classes * bytes_of_class(*tokens, size, with_gradients=True)
    assert kept < bound < 2 * kept  # the bound counts a layer that is being computed, too


class TestChoice:
    @pytest.fixture
    def on_a_device(self, monkeypatch):
        """A text tower on a device (`meta`, which every torch has) with some free memory."""

        def use(free, num_classes=300):
            monkeypatch.setattr("clip_prompt_peft.text.encoder.free_bytes", lambda device: free)
            return build(num_classes).to("meta")

        return use

    def chunks(self, classifier):
        prompts, layout = classifier.class_prompts, classifier.prompt_layout
        encoder = classifier.class_encoder
        return encoder._chunks_of(classifier, prompts, layout, range(len(prompts.texts)))[0]

    def test_with_much_memory_there_is_one_chunk(self, on_a_device):
        assert len(self.chunks(on_a_device(GIB))) == 1

    def test_with_little_memory_there_are_chunks_of_all_classes(self, on_a_device):
        chunks = self.chunks(on_a_device(2**24))
        assert len(chunks) > 3
        assert sum(len(chunk.classes) for chunk in chunks) == 300

    def test_a_cpu_keeps_its_chunks_whatever_is_free(self, monkeypatch):
        monkeypatch.setattr("clip_prompt_peft.text.encoder.free_bytes", lambda device: 2**20)
        assert len(self.chunks(build(300))) == 3
        assert len(self.chunks(build(256))) == 1

    def test_processes_that_may_shard_the_tower_have_the_same_chunks(self, on_a_device, monkeypatch):
        monkeypatch.setattr("clip_prompt_peft.text.encoder.num_processes", lambda: 2)
        numbers = []
        for free in (2**24, GIB):
            classifier = on_a_device(free)
            classifier.text_model.register_forward_hook(lambda *args: None)  # as FSDP and DeepSpeed do
            numbers.append(len(self.chunks(classifier)))
        assert numbers == [3, 3]
