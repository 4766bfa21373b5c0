"""A LoRA of peft in the same model as a prompt adapter; docs/lora_beside_prompts.md says what works."""

import subprocess
import sys

import pytest
import torch
from adapters import logits_of, train_with_sgd
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


BOTH = r".*\.(q_proj|v_proj)"
VISION = r"vision_model.*\.(q_proj|v_proj)"
TEXT = r"text_model.*\.(q_proj|v_proj)"


def lora_config(target_modules=BOTH, **kwargs):
    return LoraConfig(target_modules=target_modules, r=2, **kwargs)


def with_both(classifier, target_modules=BOTH):
    classifier.add_adapter(lora_config(target_modules), "towers")
    return get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts")


def trainable(model):
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = {"lora_": "LoRA", "learnable_": "prompts"}
    return {next(kind for part, kind in kinds.items() if part in name) for name in names}


def fit(model, pixel_values, labels, steps=3):
    losses = train_with_sgd(model, {"pixel_values": pixel_values, "labels": labels}, lr=0.1, num_steps=steps)
    model.eval()
    return losses


def load_both(folder):
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    model.load_adapter(str(folder / "towers"), adapter_name="towers")
    return PeftModel.from_pretrained(model, folder / "prompts", adapter_name="prompts")


def test_at_the_start_both_together_are_the_zero_shot_model(classifier, pixel_values):
    zero_shot = logits_of(classifier, pixel_values)
    torch.testing.assert_close(logits_of(with_both(classifier), pixel_values), zero_shot)


@pytest.mark.parametrize("target_modules", [VISION, TEXT, BOTH])
def test_both_are_trained_together(classifier, pixel_values, labels, target_modules):
    model = with_both(classifier, target_modules)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = fit(model, pixel_values, labels)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in start.items())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("target_modules", [VISION, BOTH])
def test_they_are_saved_as_two_adapters_and_give_the_same_logits_when_loaded(
    classifier, pixel_values, labels, tmp_path, target_modules
):
    model = with_both(classifier, target_modules)
    fit(model, pixel_values, labels)
    expected = logits_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = load_both(tmp_path)
    assert loaded.get_base_model().class_names == CLASS_NAMES
    assert trainable(loaded) == set()
    assert torch.equal(logits_of(loaded.eval(), pixel_values), expected)


FRESH = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from clip_prompt_peft import CLIPForPromptClassification

base, folder = sys.argv[1], Path(sys.argv[2])
model = CLIPForPromptClassification.from_pretrained(base)
model.load_adapter(str(folder / "towers"), adapter_name="towers")
model = PeftModel.from_pretrained(model, folder / "prompts", adapter_name="prompts").eval()
torch.save(model(pixel_values=torch.load(folder / "pixels.pt")).logits, folder / "logits.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_logits(classifier, pixel_values, labels, tmp_path):
    model = with_both(classifier)
    fit(model, pixel_values, labels)
    model.save_pretrained(tmp_path)
    torch.save(pixel_values, tmp_path / "pixels.pt")
    subprocess.run([sys.executable, "-c", FRESH, TINY_CLIP, str(tmp_path)], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model, pixel_values), rtol=0, atol=1e-6)


def test_prompts_are_tuned_on_a_finished_lora(classifier, pixel_values, labels, tmp_path):
    classifier.add_adapter(lora_config(), "towers")
    fit(classifier, pixel_values, labels)
    classifier.save_pretrained(tmp_path)
    after_lora = logits_of(classifier, pixel_values)

    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
    base.load_adapter(str(tmp_path), adapter_name="towers")
    model = get_peft_model(base, CLIPPromptTuningConfig(), adapter_name="prompts").eval()
    assert trainable(model) == {"prompts"}
    assert torch.equal(logits_of(model, pixel_values), after_lora)
    losses = fit(model, pixel_values, labels)
    assert losses[-1] < losses[0]


def test_lora_is_tuned_on_finished_prompts(classifier, pixel_values, labels, tmp_path):
    prompts = get_peft_model(classifier, CLIPPromptTuningConfig())
    fit(prompts, pixel_values, labels)
    prompts.save_pretrained(tmp_path)
    after_prompts = logits_of(prompts, pixel_values)

    base = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    base.add_adapter(lora_config(), "towers")
    model = PeftModel.from_pretrained(base, tmp_path, adapter_name="prompts").eval()
    assert trainable(model) == {"LoRA"}
    torch.testing.assert_close(logits_of(model, pixel_values), after_prompts)
    losses = fit(model, pixel_values, labels)
    assert losses[-1] < losses[0]


class Examples(torch.utils.data.Dataset):
    def __init__(self, pixel_values, labels):
        self.rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels)] * 4

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.slow
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(pixel_values, labels, tmp_path):
    def train(resume_from=None):
        torch.manual_seed(0)
        base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)
        model = with_both(base)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Examples(pixel_values, labels)).train(
            resume_from_checkpoint=resume_from
        )
        return model

    whole = train()
    resumed = train(tmp_path / "checkpoint-2")
    assert trainable(resumed) == {"LoRA", "prompts"}
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(value, other), name


def test_both_are_merged_into_a_plain_clip(classifier, pixel_values, labels):
    model = with_both(classifier)
    fit(model, pixel_values, labels)
    tuned = logits_of(model, pixel_values)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, pixel_values), tuned, rtol=0, atol=1e-4)
    clip = merged.to_clip()
    assert not [name for name, _ in clip.named_parameters() if "lora" in name or "learnable" in name]


def test_disabling_switches_both_off_and_set_adapter_one_of_them(classifier, pixel_values, labels):
    zero_shot = logits_of(classifier, pixel_values)
    model = with_both(classifier)
    fit(model, pixel_values, labels)
    tuned = logits_of(model, pixel_values)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, pixel_values), zero_shot)
    assert torch.equal(logits_of(model, pixel_values), tuned)

    classifier.set_adapter(["prompts"])
    only_prompts = logits_of(model, pixel_values)
    classifier.set_adapter(["towers"])
    only_lora = logits_of(model, pixel_values)
    for one in (only_prompts, only_lora):
        assert min((one - zero_shot).abs().max(), (one - tuned).abs().max()) > 1e-3
    classifier.set_adapter(["towers", "prompts"])
    assert torch.equal(logits_of(model, pixel_values), tuned)


def test_deleting_lora_leaves_the_prompts(classifier, pixel_values, labels):
    model = with_both(classifier)
    fit(model, pixel_values, labels)
    classifier.set_adapter(["prompts"])
    only_prompts = logits_of(model, pixel_values)
    classifier.set_adapter(["towers", "prompts"])
    classifier.delete_adapter("towers")
    assert list(model.peft_config) == ["prompts"]
    assert torch.equal(logits_of(model, pixel_values), only_prompts)


def test_in_a_mixed_batch_lora_acts_on_all_images(classifier, pixel_values, labels):
    model = with_both(classifier)
    fit(model, pixel_values, labels)
    tuned = logits_of(model, pixel_values)
    mixed = model(pixel_values=pixel_values, adapter_names=["prompts", "__base__", "prompts"]).logits
    classifier.set_adapter(["towers"])
    only_lora = logits_of(model, pixel_values)
    torch.testing.assert_close(mixed[[0, 2]], tuned[[0, 2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], only_lora[1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no adapter 'towers'"):
        model(pixel_values=pixel_values, adapter_names=["towers"] * 3)


def test_one_name_for_both_is_refused_before_anything_is_lost(classifier):
    classifier.add_adapter(lora_config(), "default")
    with pytest.raises(ValueError, match="already holds a LORA adapter named 'default'"):
        get_peft_model(classifier, CLIPPromptTuningConfig())
    assert isinstance(classifier.peft_config["default"], LoraConfig)
    assert classifier.prompt_layout is None


def test_a_lora_with_modules_of_its_own_is_refused(classifier):
    classifier.add_adapter(lora_config(modules_to_save=["visual_projection"]), "towers")
    with pytest.raises(ValueError, match="'towers' in the model has modules_to_save"):
        get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts")


def test_a_lora_that_comes_after_the_prompts_must_be_activated_together_with_them(classifier, pixel_values, labels):
    model = get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts")
    fit(model, pixel_values, labels)
    tuned = logits_of(model, pixel_values)
    classifier.add_adapter(lora_config(), "towers")
    assert classifier.prompt_layout is None  # transformers has made the new one the only one
    classifier.set_adapter(["prompts", "towers"])
    assert trainable(model) == {"LoRA", "prompts"}
    torch.testing.assert_close(logits_of(model.eval(), pixel_values), tuned)


def test_peft_itself_refuses_other_ways(classifier, tmp_path):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(classifier, CLIPPromptTuningConfig(), mixed=True)
    lora = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path)
    prompts = get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="prompts")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        prompts.load_adapter(tmp_path, "towers")
