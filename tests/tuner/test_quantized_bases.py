"""Prompts on quantized base models: by bitsandbytes and torchao where installed, and by layers like theirs."""

import dataclasses
import importlib.util
import warnings

import pytest
import torch
from adapters import as_if_trained
from families import CLASS_NAMES, FAMILIES, TOWER
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, CLIPModel, TorchAoConfig

from clip_prompt_peft import AutoModelForPromptClassification, ClassHeadConfig, CLIPPromptTuningConfig
from clip_prompt_peft.data import cache_image_embeds, load_image_dataset
from clip_prompt_peft.export import export_classifier
from clip_prompt_peft.text import ClassEncoder
from clip_prompt_peft.text.memory import TowerSize
from clip_prompt_peft.text.packing import PACKED, PLAIN, exact_path
from clip_prompt_peft.towers import find_towers, is_quantized


WIDE = {**TOWER, "hidden_size": 64, "intermediate_size": 128, "projection_dim": 64}  # blocks of 4-bit weights are 64
FAMILY = dataclasses.replace(
    FAMILIES["CLIP"], text=WIDE, vision={**FAMILIES["CLIP"].vision, **WIDE}, both={"projection_dim": 64}
)
IMAGES = FAMILY.image_inputs()
LABELS = torch.tensor([0, 2, 1, 3])
EMOJI = "clip_prompt_peft/assets/emoji/noto-train.parquet"


def weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def with_activations():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


QUANTIZATIONS = {
    "bitsandbytes-8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-fp4": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes-nf4-double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao-8": weight_only,
}
# The largest difference of logits of a few units, of weights at random.
DISTANCE = {"bitsandbytes-8": 0.5, "bitsandbytes-fp4": 3.0, "bitsandbytes-nf4-double": 3.0, "torchao-8": 0.5}


def only_if_installed(name):
    library = name.partition("-")[0]
    missing = importlib.util.find_spec(library) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{library} is not installed"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(FAMILY.save(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def load(folder):
    def make(quantization=None, **kwargs):
        if quantization is not None:
            kwargs["quantization_config"] = QUANTIZATIONS[quantization]()
        return AutoModelForPromptClassification.from_pretrained(
            folder, class_names=CLASS_NAMES, prompt_template=FAMILY.template, **kwargs
        ).eval()

    return make


@torch.no_grad()
def logits_of(model):
    return model.eval()(**IMAGES).logits


def trained(model, num_steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model.train()(**IMAGES, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=map(only_if_installed, QUANTIZATIONS))
def quantization(request):
    return request.param


class TestLife:
    def test_logits_are_near_those_of_full_precision_and_those_of_prompts_untrained(self, quantization, load):
        zero_shot = logits_of(load(quantization))
        difference = (zero_shot - logits_of(load())).abs().max()
        assert 0 < difference < DISTANCE[quantization]
        model = get_peft_model(load(quantization), CLIPPromptTuningConfig())
        torch.testing.assert_close(logits_of(model), zero_shot, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("preset", ["coop", "coop-csc", "cocoop", "maple", "tcp"])
    def test_vectors_in_float32_are_trained_after_an_evaluation_saved_and_loaded(
        self, quantization, preset, load, tmp_path
    ):
        base = load(quantization)
        logits_of(base)
        fields = {"class_aware_layer": 1} if preset == "tcp" else {}
        model = get_peft_model(base, CLIPPromptTuningConfig.from_preset(preset, model=base, **fields))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        logits_of(model)
        first, second = trained(model)
        assert second < first
        expected = logits_of(as_if_trained(model))
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The adapter")
            loaded = PeftModel.from_pretrained(load(quantization), tmp_path).eval()
            PeftModel.from_pretrained(load(), tmp_path)  # on full precision: the same base model
        torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)

    def test_an_adapter_of_full_precision_is_loaded_without_a_warning(self, quantization, load, tmp_path):
        get_peft_model(load(), CLIPPromptTuningConfig()).save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The adapter")
            PeftModel.from_pretrained(load(quantization), tmp_path)

    def test_prompts_are_merged_exactly(self, quantization, load):
        model = as_if_trained(get_peft_model(load(quantization), CLIPPromptTuningConfig()))
        expected = logits_of(model)
        torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=0, atol=1e-4)

    def test_lora_is_trained_beside_prompts(self, quantization, load):
        base = load(quantization)
        base.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="lora")
        model = get_peft_model(base, CLIPPromptTuningConfig())
        model(**IMAGES, labels=LABELS).loss.backward()
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "learnable_vectors" in n)
        assert logits_of(model).isfinite().all()

    def test_a_batch_may_mix_adapters(self, quantization, load):
        model = as_if_trained(get_peft_model(load(quantization), CLIPPromptTuningConfig()))
        expected = {"default": logits_of(model), "__base__": logits_of(load(quantization))}
        names = ["__base__", "default", "default", "__base__"]
        with torch.no_grad():
            mixed = model(**IMAGES, adapter_names=names).logits
        torch.testing.assert_close(
            mixed, torch.stack([expected[name][i] for i, name in enumerate(names)]), rtol=0, atol=1e-4
        )


class TestTowers:
    @pytest.mark.parametrize("preset", ["coop", "coop-csc", "tcp"])
    def test_the_automatic_path_gives_the_embeddings_of_the_plain_one(self, quantization, preset, load):
        base = load(quantization)
        fields = {"class_aware_layer": 1} if preset == "tcp" else {}
        model = get_peft_model(base, CLIPPromptTuningConfig.from_preset(preset, model=base, **fields))
        classifier = as_if_trained(model).eval().get_base_model()
        # Linear8bitLt rounds activations, of which those of outliers by all tokens of the batch.
        assert exact_path(classifier) == (PLAIN if quantization == "bitsandbytes-8" else PACKED)
        embeds = []
        for path in ("plain", "auto"):
            classifier.class_encoder.path = path
            classifier.class_encoder.clear()
            with torch.no_grad():
                embeds.append(classifier.get_class_embeds())
        torch.testing.assert_close(embeds[1], embeds[0], rtol=0, atol=1e-5)

    def test_class_embeddings_are_kept_until_the_adapter_changes(self, quantization, load, monkeypatch):
        model = get_peft_model(load(quantization), CLIPPromptTuningConfig())
        classifier, encode, calls = model.eval().get_base_model(), ClassEncoder._encode, []
        monkeypatch.setattr(ClassEncoder, "_encode", lambda *args: calls.append(1) or encode(*args))
        with torch.no_grad():
            first = [classifier.get_class_embeds() for _ in range(4)][-1]
            num_calls = len(calls)
            assert num_calls <= 2  # the first call of bitsandbytes moves the weights
            as_if_trained(model)
            assert not torch.equal(classifier.get_class_embeds(), first) and len(calls) == num_calls + 1

    def test_sizes_are_those_of_the_activations(self, quantization, load):
        assert TowerSize.of(load(quantization), is_trained=False) == TowerSize.of(load(), is_trained=False)

    def test_image_embeddings_are_cached_before_and_after_an_evaluation(self, quantization, load, tmp_path):
        images = load_image_dataset(files={"train": EMOJI}, cache_dir=str(tmp_path))["train"].select(range(2))
        model = load(quantization)
        logits_of(model)
        embedded = [cache_image_embeds(images, one, FAMILY.image_processor) for one in (model, load(quantization))]
        assert embedded[0]._fingerprint == embedded[1]._fingerprint
        full = cache_image_embeds(images, load(), FAMILY.image_processor)
        assert full._fingerprint != embedded[0]._fingerprint

    def test_it_is_not_exported(self, quantization, load, tmp_path):
        with pytest.raises(ValueError, match="image tower is quantized .*load the base model in float32"):
            export_classifier(load(quantization), tmp_path, image_processor=FAMILY.image_processor)
        assert not list(tmp_path.iterdir())

    def test_a_classifier_is_saved_and_loaded(self, quantization, load, tmp_path):
        if quantization == "torchao-8":
            pytest.skip("transformers 5.23 does not read what it has written of torchao 0.18")
        model = load(quantization)
        expected = logits_of(model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(
            logits_of(AutoModelForPromptClassification.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5
        )


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_quantized_activations_pass_no_gradient_and_are_refused_for_training_only(load, folder, tmp_path):
    get_peft_model(load(), CLIPPromptTuningConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight a Int8Tensor\\) passes no gradient.*Quantize the weights only"):
        get_peft_model(load(quantization_config=with_activations()), CLIPPromptTuningConfig())
    with pytest.raises(ValueError, match="passes no gradient.*Quantize the weights only"):  # nor to LayerNorms
        get_peft_model(load(quantization_config=with_activations()), ClassHeadConfig.from_preset("2sfs"))
    head = get_peft_model(load(quantization_config=with_activations()), ClassHeadConfig())  # behind the towers
    head.train()(**IMAGES, labels=torch.tensor([0] * len(IMAGES["pixel_values"]))).loss.backward()
    assert head.base_model.head.head("default").class_embeds.grad.any()
    loaded = PeftModel.from_pretrained(load(quantization_config=with_activations()), tmp_path)
    assert exact_path(loaded.get_base_model()) == PLAIN
    assert (logits_of(loaded) - logits_of(load())).abs().max() < 0.5


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_layers_that_were_packed_for_evaluation_are_refused(folder):
    plain = CLIPModel.from_pretrained(folder, quantization_config=QUANTIZATIONS["bitsandbytes-fp4"]()).eval()
    plain.tokenizer = FAMILY.make_tokenizer()
    if not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in plain.modules()):
        pytest.skip("this CPU has no kernel of its own for 4 bits")
    with torch.no_grad():
        plain.get_image_features(**IMAGES)
        plain.get_text_features(input_ids=torch.tensor([[0, 5, 3]]))
    with pytest.raises(ValueError, match="fails in training .*put the adapter in first"):
        get_peft_model(plain, CLIPPromptTuningConfig())


class Packed(nn.Module):
    """As in HQQ, GPTQ, AWQ or FP8: other tensors in place of the weight, as parameters or as buffers."""

    def __init__(self, linear, kind):
        super().__init__()
        self.kind, (self.out_features, self.in_features) = kind, linear.weight.shape
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round()
        if kind == "fp8":
            codes = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        elif kind == "hqq":
            self.W_q = nn.Parameter(codes.to(torch.int8), requires_grad=False)
            self.meta = {"scale": scale}
        else:
            self.bias = None
            for name, value in (("qweight", codes.to(torch.int8)), ("scales", scale), ("bias", linear.bias)):
                self.__dict__.pop(name, None)
                self._parameters.pop(name, None)
                self.register_buffer(name, None if value is None else value.detach())

    def forward(self, x):
        codes, scale = {
            "fp8": lambda: (self.weight, self.weight_scale_inv),
            "hqq": lambda: (self.W_q, self.meta["scale"]),
            "gptq": lambda: (self.qweight, self.scales),
        }[self.kind]()
        return nn.functional.linear(x, codes.to(x.dtype) * scale, self.bias)


def packed(classifier, kind):
    for tower in (classifier.text_model, classifier.vision_model):
        for parent in list(tower.encoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Packed(child, kind))
    return classifier


@pytest.mark.parametrize("kind", ["hqq", "gptq", "fp8"])
class TestOtherLibraries:
    def test_the_base_model_is_the_same_here_and_there(self, kind, load, tmp_path):
        quantized = packed(load(), kind)
        assert sum(map(is_quantized, quantized.modules())) == 2 * 3 * 6 and not any(
            map(is_quantized, load().modules())
        )
        models = {"quantized": lambda: packed(load(), kind), "full": load}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The adapter")
            for name, make in models.items():
                get_peft_model(make(), CLIPPromptTuningConfig()).save_pretrained(tmp_path / name)
                for other in models.values():
                    PeftModel.from_pretrained(other(), tmp_path / name)

    def test_another_base_model_is_still_told(self, kind, load, tmp_path):
        get_peft_model(load(), CLIPPromptTuningConfig()).save_pretrained(tmp_path)
        other = packed(load(), kind)
        other.text_projection.weight.data *= 1.5
        with pytest.warns(UserWarning, match="was trained on other weights .* text_projection differs"):
            PeftModel.from_pretrained(other, tmp_path)

    def test_prompts_are_trained_along_the_plain_path(self, kind, load):
        model = get_peft_model(packed(load(), kind), CLIPPromptTuningConfig())
        assert exact_path(model.get_base_model()) == PLAIN
        first, second = trained(model)
        assert second < first


def test_a_bfloat16_base_has_vectors_in_float32_that_are_trained_saved_and_loaded(load, tmp_path):
    base = load(dtype=torch.bfloat16)
    assert {tower.like.dtype for kind in ("text", "vision") for tower in find_towers(base, kind)} == {torch.bfloat16}
    model = get_peft_model(base, CLIPPromptTuningConfig.from_preset("maple", model=base))
    first, second = trained(model)
    assert second < first
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = logits_of(model)
    assert (expected - logits_of(load(dtype=torch.float16))).isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    assert {p.dtype for n, p in loaded.named_parameters() if ".learnable_" in n} == {torch.float32}
