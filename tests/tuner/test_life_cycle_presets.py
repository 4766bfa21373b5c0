"""Every preset through its whole life, in classifiers of two sizes, with either kind of end token config."""

import copy
import functools

import pytest
import torch
from adapters import as_if_trained, logits_of, train_with_sgd
from conftest import TINY_CLIP, golden_base_folder, slow_param
from peft import PeftModel, get_peft_model

from clip_prompt_peft import (
    PRESETS,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)


CLASS_NAMES = ["cat", "golden retriever", "lily of the valley"]
LABELS = torch.tensor([0, 2, 1, 1])
MERGEABLE = {"coop", "kgcoop", "prograd"}
# The class embeddings of a teacher, and a bias in front of a BatchNorm, which takes it off again.
KEPT = ("learnable_teacher_embeds", "learnable_projector_in.default.bias")
MERGED = {"rtol": 0, "atol": 1e-4}
LOADED = {"rtol": 0, "atol": 1e-5}  # a matrix that lies at another place in memory is multiplied in another order

# Widths: text 128, image 160, 3 and 4 layers; and text 128, image 64, 4 and 5 layers, with an odd number of vectors.
BASES = ["tiny", "golden_legacy_eos", "golden_fixed_eos"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    golden = {
        f"golden_{kind}": golden_base_folder(kind, tmp_path_factory.mktemp(kind))
        for kind in ("legacy_eos", "fixed_eos")
    }
    return {"tiny": TINY_CLIP, **golden}


@functools.cache
def load_base(folder):
    return CLIPForPromptClassification.from_pretrained(folder, class_names=CLASS_NAMES).eval()


class Case:
    def __init__(self, preset, folder):
        self.preset, self.folder = preset, folder
        size = load_base(folder).config.vision_config.image_size
        self.pixel_values = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))

    def base(self):
        return copy.deepcopy(load_base(self.folder))

    def config(self, model):
        fields = dict(PRESETS[self.preset])
        odd = {}
        if self.folder != TINY_CLIP:
            odd = {name: 3 for name in ("num_virtual_tokens", "num_vision_virtual_tokens") if fields.get(name)}
        return CLIPPromptTuningConfig.from_preset(self.preset, model=model, **odd)

    def prompted(self):
        """As if it had been trained."""
        base = self.base()
        return as_if_trained(get_peft_model(base, self.config(base)).eval())

    def logits(self, model):
        return logits_of(model, self.pixel_values)


PAIRS = [(preset, base) for preset in PRESETS for base in BASES]
IN_A_QUICK_RUN = [*((preset, "tiny") for preset in PRESETS), ("maple", "golden_legacy_eos")]


@pytest.fixture(params=[pair if pair in IN_A_QUICK_RUN else slow_param(pair) for pair in PAIRS], ids="-".join)
def case(request, folders):
    preset, base = request.param
    return Case(preset, folders[base])


def test_a_step_lowers_the_loss_and_changes_every_tensor_of_the_adapter_and_no_other(case):
    model = case.prompted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {"pixel_values": case.pixel_values, "labels": LABELS, "return_loss_terms": True}
    losses = train_with_sgd(model, inputs, lr=1e-4, num_steps=2)
    assert losses[1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    kept = {name for name in before if any(part in name for part in KEPT)}
    assert changed == {name for name in before if ".learnable_" in name} - kept


def test_an_adapter_of_any_name_is_saved_under_the_same_keys(case, tmp_path):
    base = case.base()
    model = as_if_trained(get_peft_model(base, case.config(base), adapter_name="mine"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "mine", adapter_name="theirs").eval()
    torch.testing.assert_close(case.logits(loaded), case.logits(model.eval()), **LOADED)


def test_a_folder_brings_back_the_same_logits_in_every_way_of_loading(case, tmp_path):
    model = case.prompted()
    expected = case.logits(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(case.logits(loaded), expected, **LOADED)
    by_transformers = case.base()
    by_transformers.load_adapter(tmp_path)
    torch.testing.assert_close(case.logits(by_transformers), expected, **LOADED)
    state = torch.get_rng_state()
    alone = AutoPeftModelForPromptClassification.from_pretrained(tmp_path, base_model_name_or_path=case.folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.get_base_model().class_names == CLASS_NAMES
    torch.testing.assert_close(case.logits(alone), expected, **LOADED)


def test_adapters_are_switched_disabled_deleted_and_unloaded(case):
    zero_shot = case.logits(case.base())
    model = case.prompted()
    expected = case.logits(model)
    assert not torch.allclose(expected, zero_shot, atol=1e-3)
    model.add_adapter("other", CLIPPromptTuningConfig(num_virtual_tokens=2))
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.enabled is True and status.merged_adapters == []
    model.set_adapter("other")
    assert torch.equal(case.logits(model), zero_shot)  # starts from the words that it replaces
    model.set_adapter("default")
    assert torch.equal(case.logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(case.logits(model), zero_shot)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(case.logits(model), zero_shot)

    base = case.prompted().unload()
    assert torch.equal(case.logits(base), zero_shot)
    assert base.state_dict().keys() == case.base().state_dict().keys()


def test_what_can_be_folded_in_merges_and_the_rest_refuses_untouched(case):
    model = case.prompted()
    expected, before = case.logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    if case.preset in MERGEABLE:
        clip = model.merge_and_unload()
        assert type(clip) is CLIPForPromptClassification
        torch.testing.assert_close(case.logits(clip), expected, **MERGED)
        return
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="Adapter 'default' cannot be merged: it"):
            merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(case.logits(model), expected)
