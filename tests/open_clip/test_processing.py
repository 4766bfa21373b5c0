"""The tokenizer and the image processor of open_clip's models give what open_clip's own give."""

import json

import pytest
import torch
from families import siglip_tokenizer, xlm_tokenizer
from open_clip_cases import GOLDEN, Case, clip, recorded, siglip, values
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from clip_prompt_peft import AutoModelForPromptClassification
from clip_prompt_peft.open_clip import find_checkpoint
from clip_prompt_peft.tuner.hub import load_image_processor


TEXTS = recorded("texts.json")


def checkpoint(folder, model_cfg, **preprocess_cfg):
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return find_checkpoint(folder)


def reading_openai(**text):
    return clip(text={"vocab_size": 49408, "context_length": 77, **text})


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_openai_s_byte_pairs_are_those_of_open_clip(clean, tmp_path):
    settings = {} if clean == "lower" else {"tokenizer_kwargs": {"clean": clean}}
    tokenizer = checkpoint(tmp_path, reading_openai(**settings)).tokenizer()
    for text, ids in zip(TEXTS["texts"], TEXTS["token_ids"][clean], strict=True):
        if ids is not None:  # open_clip takes special tokens in texts for words
            assert tokenizer(text)["input_ids"] == ids, text
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77


def test_the_tokenizer_is_the_same_after_it_was_saved(tmp_path):
    tokenizer = checkpoint(tmp_path, reading_openai()).tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(TEXTS["texts"])["input_ids"] == tokenizer(TEXTS["texts"])["input_ids"]


@pytest.mark.parametrize("make", [siglip_tokenizer, xlm_tokenizer])
@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
def test_a_tokenizer_beside_the_weights_reads_texts_as_open_clip_cleans_them(make, clean, tmp_path):
    make().save_pretrained(tmp_path)
    model_cfg = siglip(text={"tokenizer_kwargs": {"clean": clean}})
    tokenizer = checkpoint(tmp_path, model_cfg).tokenizer()
    plain = make()
    cleaned = TEXTS["cleaned"].get(clean)
    for text, text_cleaned in zip(TEXTS["texts"], cleaned, strict=True):
        assert tokenizer(text)["input_ids"] == plain(text_cleaned)["input_ids"], text


def test_other_ways_to_read_texts_are_refused(tmp_path):
    siglip_tokenizer().save_pretrained(tmp_path)
    model_cfg = siglip(text={"tokenizer_kwargs": {"strip_sep_token": True}})
    with pytest.raises(ValueError, match="strip_sep_token.*cannot be followed"):
        checkpoint(tmp_path, model_cfg).tokenizer()


def test_a_vocabulary_of_its_own_without_a_tokenizer_is_told(tmp_path):
    Case("plain").write(tmp_path)
    with pytest.raises(ValueError, match="no files of a tokenizer in .* whose vocabulary of 99"):
        AutoModelForPromptClassification.from_pretrained(tmp_path, class_names=["cat", "dog"])


PIXELS = load_file(GOLDEN / "pixels.safetensors")
# An odd number of rows is left over, 7, of which transformers cuts 3 at the top, and torchvision 4.
CROPPED_ONE_ROW_HIGHER = {"shortest.40x52", "bilinear.40x52"}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_those_of_open_clip(name, tmp_path):
    kind, _, size = name.partition(".")
    width, height = map(int, size.split("x"))
    processor = checkpoint(tmp_path, clip(), **recorded("pixels.json")[kind]).image_processor()
    pixels = (127.5 * (values(size, (height, width, 3)) + 1)).byte()
    actual = processor(Image.fromarray(pixels.numpy()), return_tensors="pt")["pixel_values"][0]
    expected = PIXELS[name].float()
    if name in CROPPED_ONE_ROW_HIGHER:
        actual, expected = actual[:, 1:], expected[:, :-1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-3)  # recorded in half precision


def test_the_image_processor_of_a_model_is_that_of_its_checkpoint_and_is_the_same_after_it_was_saved(tmp_path):
    folder = Case("plain").write(
        tmp_path / "theirs", {"mean": 0.5, "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    )
    processor = load_image_processor(AutoModelForPromptClassification.from_pretrained(folder))
    assert list(processor.image_mean) == [0.5] * 3 and list(processor.image_std) == [0.1, 0.2, 0.3]
    assert processor.resample == 2
    processor.save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    image = Image.new("RGB", (50, 30), "orange")
    assert torch.equal(*(one(image, return_tensors="pt")["pixel_values"] for one in (processor, again)))
