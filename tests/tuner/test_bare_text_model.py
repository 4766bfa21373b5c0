"""A learned word in a bare `CLIPTextModel`, such as the text encoder of Stable Diffusion, which pads to 77 tokens."""

import re
import runpy
import sys

import pytest
import torch
from adapters import as_if_trained
from conftest import ROOT, TINY_CLIP
from peft import PeftModel, get_peft_model
from transformers import CLIPTextModel
from transformers.utils import logging

from clip_prompt_peft import CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings


TEMPLATE = "a photo of a X {}."


@pytest.fixture
def quiet():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def padded(tokenizer):
    def tokens(text):
        return tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")

    return tokens


@pytest.fixture
def inverted():
    """A text encoder with a word as if it had been learned."""
    config = CLIPPromptTuningConfig(prompt_template=TEMPLATE, start_idx=5, num_virtual_tokens=1)
    return as_if_trained(get_peft_model(CLIPTextModel.from_pretrained(TINY_CLIP), config).eval())


@torch.no_grad()
def states(model, tokens):
    return model(**tokens).last_hidden_state  # (B, 77, D), what a denoiser is conditioned on


def test_the_example_learns_a_word_that_finds_the_pictures_of_its_kind(tmp_path, monkeypatch, capsys, quiet, padded):
    script = ROOT / "examples" / "textual_inversion.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--num_steps", "40", "--output_dir", str(tmp_path)])
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < first
    by_its_name, learned = (int(share) for share in re.findall(r"^(\d+)% for", printed, re.MULTILINE))
    assert learned > by_its_name
    size = sum(file.stat().st_size for file in (tmp_path / "face").glob("*.safetensors"))
    assert size < 2000


@pytest.mark.parametrize("loaded_by", ["transformers", "peft"])
def test_a_fresh_text_encoder_gives_the_same_states_for_any_noun(inverted, padded, tmp_path, loaded_by):
    inverted.save_pretrained(tmp_path)
    fresh = CLIPTextModel.from_pretrained(TINY_CLIP)
    if loaded_by == "transformers":
        fresh.load_adapter(str(tmp_path))
    else:
        fresh = PeftModel.from_pretrained(fresh, tmp_path)
    for noun in ("toy", "face", "car on the street"):
        tokens = padded(TEMPLATE.format(noun))
        assert torch.equal(states(fresh.eval(), tokens), states(inverted, tokens))


def test_a_merged_text_encoder_is_a_plain_one_for_texts_of_the_template(inverted, padded):
    tokens = padded(TEMPLATE.format("toy"))
    expected = states(inverted, tokens)
    merged = inverted.merge_and_unload()
    assert type(merged) is CLIPTextModel
    assert not any(isinstance(module, CLIPTextLearnableEmbeddings) for module in merged.modules())
    torch.testing.assert_close(states(merged, tokens), expected, rtol=0, atol=1e-4)


def test_an_empty_prompt_is_the_base_models_while_the_adapter_is_off(inverted, padded, tmp_path):
    base = CLIPTextModel.from_pretrained(TINY_CLIP).eval()
    with inverted.disable_adapter():
        assert torch.equal(states(inverted, padded("")), states(base, padded("")))

    inverted.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(TINY_CLIP).eval()
    loaded.load_adapter(str(tmp_path))
    learned = states(loaded, padded(TEMPLATE.format("toy")))
    loaded.disable_adapters()
    assert torch.equal(states(loaded, padded("")), states(base, padded("")))
    loaded.enable_adapters()
    assert torch.equal(states(loaded, padded(TEMPLATE.format("toy"))), learned)
