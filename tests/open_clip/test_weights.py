"""Tiny models of open_clip give its numbers, and damaged checkpoints are refused with the first name."""

import pickle

import pytest
import torch
from open_clip_cases import CASES, Case, pixel_values, token_ids
from safetensors.torch import load_file, save_file

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    CLIPForPromptClassification,
    MetaClip2ForPromptClassification,
)
from clip_prompt_peft.open_clip import find_checkpoint


@torch.no_grad()
def outputs(model, model_cfg):
    return model.eval()(input_ids=token_ids(model_cfg), pixel_values=pixel_values())


@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_logits_are_those_of_open_clip(name, tmp_path):
    case = Case(name)
    assert case.model_cfg == CASES[name]
    model = AutoModelForPromptClassification.from_pretrained(case.write(tmp_path))
    output = outputs(model, case.model_cfg)
    torch.testing.assert_close(output.image_embeds, case.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.text_embeds, case.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.logits_per_image, case.logits, rtol=0, atol=1e-4)  # the scale is 100
    assert case.logits.std() > 1  # images and texts are told apart


@pytest.mark.parametrize("name", ["plain", "end token", "SigLIP"])
def test_a_checkpoint_that_torch_saved_is_the_same(name, tmp_path):
    case = Case(name)
    model = AutoModelForPromptClassification.from_pretrained(case.write(tmp_path, pickled=True))
    torch.testing.assert_close(outputs(model, case.model_cfg).logits_per_image, case.logits, rtol=0, atol=1e-4)


def test_the_checkpoint_of_a_training_is_read_and_what_is_not_used_is_told(tmp_path, caplog):
    case = Case("plain")
    tensors = {f"module.{name}": tensor for name, tensor in case.tensors.items()}
    case.write(tmp_path, pickled=True, tensors={"state_dict": tensors, "epoch": 3, "name": "run"})
    model = AutoModelForPromptClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(model, case.model_cfg).logits_per_image, case.logits, rtol=0, atol=1e-4)
    assert "only 'state_dict' is used, and not epoch, name" in caplog.text


def test_half_precision_stays_and_another_dtype_can_be_asked_for(tmp_path):
    case = Case("layer scale in the image tower")
    case.write(tmp_path, tensors={name: tensor.half() for name, tensor in case.tensors.items()})
    assert AutoModelForPromptClassification.from_pretrained(tmp_path).dtype == torch.float16
    model = AutoModelForPromptClassification.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(outputs(model, case.model_cfg).image_embeds, case.image_embeds, rtol=0, atol=2e-3)


def test_a_classifier_that_is_saved_is_one_of_transformers(tmp_path):
    case = Case("layer scale in the image tower")
    model = AutoModelForPromptClassification.from_pretrained(case.write(tmp_path / "theirs"))
    model.to_base().save_pretrained(tmp_path / "ours")
    again = AutoModelForPromptClassification.from_pretrained(tmp_path / "ours")
    assert find_checkpoint(tmp_path / "ours") is None and not again.config.name_or_path.endswith("theirs")
    assert torch.equal(
        outputs(again, case.model_cfg).logits_per_image, outputs(model, case.model_cfg).logits_per_image
    )


def test_settings_of_the_config_may_be_given(tmp_path):
    folder = Case("plain").write(tmp_path)
    model = AutoModelForPromptClassification.from_pretrained(
        folder, problem_type="multi_label_classification", attn_implementation="eager"
    )
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.text_config._attn_implementation == "eager"


def test_the_class_of_another_family_says_what_the_checkpoint_becomes(tmp_path):
    folder = Case("SigLIP").write(tmp_path)
    for family in (CLIPForPromptClassification, MetaClip2ForPromptClassification):
        with pytest.raises(ValueError, match="becomes a SiglipModel, and no (CLIP|MetaClip2)Model"):
            family.from_pretrained(folder)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_one(name, value):
    return lambda tensors: {**tensors, name: value}


IN_CLIP, IN_SIGLIP = "plain", "SigLIP"
FAULTS = [
    (IN_CLIP, without("visual.ln_post.bias"), "lacks 'visual.ln_post.bias' (32,)"),
    (IN_CLIP, without("text_projection"), "lacks 'text_projection' (32, 24)"),
    (IN_CLIP, without("logit_scale"), "lacks 'logit_scale'"),
    (IN_CLIP, with_one("visual.conv1.weight", torch.ones(32, 3, 9, 9)), "conv1.weight' of shape (32, 3, 9, 9)"),
    (IN_CLIP, with_one("positional_embedding", torch.ones(77, 32)), "'positional_embedding' of shape (77, 32)"),
    (IN_CLIP, with_one("visual.transformer.resblocks.2.ln_1.bias", torch.ones(32)), "resblocks.2.ln_1.bias', which"),
    (IN_CLIP, with_one("aaa", torch.ones(1)), "holds 'aaa', which its configuration has no place for"),
    (IN_CLIP, with_one("logit_bias", torch.ones(())), "holds 'logit_bias', which"),
    (IN_CLIP, with_one("ln_final.weight", torch.ones(32, dtype=torch.int64)), "'ln_final.weight' as torch.int64"),
    (IN_CLIP, lambda tensors: {}, "holds no tensors"),
    (IN_SIGLIP, without("logit_bias"), "lacks 'logit_bias'"),
    (IN_SIGLIP, without("visual.trunk.attn_pool.q.bias"), "lacks 'visual.trunk.attn_pool.q.bias' (32,)"),
    (IN_SIGLIP, with_one("visual.trunk.pos_embed", torch.ones(1, 4, 32)), "trunk.pos_embed' of shape (1, 4, 32)"),
    ("layer scale in the text tower", without("text.transformer.resblocks.1.ls_2.gamma"), "lacks 'text.transformer"),
    ("plain", with_one("transformer.resblocks.0.ls_1.gamma", torch.ones(32)), "resblocks.0.ls_1.gamma', which"),
]  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(("name", "change", "said"), FAULTS, ids=lambda x: x if isinstance(x, str) else "")
def test_weights_that_do_not_fit_are_refused_with_the_first_name(name, change, said, pickled, tmp_path):
    case = Case(name)
    case.write(tmp_path, tensors=change(case.tensors), pickled=pickled)
    with pytest.raises(ValueError) as raised:
        AutoModelForPromptClassification.from_pretrained(tmp_path)
    assert said in str(raised.value) and str(tmp_path) in str(raised.value)


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_with_code_are_refused_and_do_not_run_it(tmp_path, capsys):
    case = Case("plain")
    case.write(tmp_path, pickled=True, tensors={**case.tensors, "aaa": Harmful()})
    with pytest.raises(ValueError, match="a pickle can run code"):
        AutoModelForPromptClassification.from_pretrained(tmp_path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], {"state_dict": {"a": 1}}, torch.nn.Linear(2, 2)])
def test_pickles_of_anything_but_tensors_are_refused(content, tmp_path):
    Case("plain").write(tmp_path, pickled=True, tensors=content)
    with pytest.raises(ValueError, match="open_clip_pytorch_model.bin"):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


BROKEN = {"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n", "zip": b"PK\x03\x04" + b"\0" * 40}


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(kind, file, tmp_path):
    Case("plain").write(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    (tmp_path / file).write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=file):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_files_that_break_off_are_refused(pickled, tmp_path):
    Case("plain").write(tmp_path, pickled=pickled)
    (file,) = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin")]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=file.name):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


def test_old_pickles_without_a_zip_are_tensors_only_too(tmp_path):
    case = Case("plain")
    case.write(tmp_path, pickled=True)
    path = tmp_path / "open_clip_pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="a pickle can run code|is no checkpoint|no tensor"):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    Case("plain").write(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights; there must be open_clip_model.safetensors or"):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


def test_a_bias_that_no_shift_of_the_norm_gives_is_refused(tmp_path):
    case = Case("bias of the projection")
    weight = case.tensors["text.text_projection.weight"].clone()
    weight[0] = 0  # this row gives its bias for every text
    case.write(tmp_path, tensors={**case.tensors, "text.text_projection.weight": weight})
    with pytest.raises(ValueError, match="bias of the text projection that CLIPModel has no place for"):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


def test_the_format_of_transformers_goes_before_that_of_open_clip(tmp_path):
    """Both lie in many repositories."""
    case = Case("plain")
    model = AutoModelForPromptClassification.from_pretrained(case.write(tmp_path))
    model.to_base().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "logit_scale": torch.tensor(1.5)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert AutoModelForPromptClassification.from_pretrained(tmp_path).logit_scale == 1.5
