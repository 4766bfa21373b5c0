"""Checkpoints in the layout of the authors' code become adapters that compute what theirs do."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TINY_CLIP, GoldenCase
from hub_stand_in import HubStandIn
from running_commands import run_command
from transformers import CLIPModel

from clip_prompt_peft import AutoPeftModelForPromptClassification
from clip_prompt_peft.commands.convert import convert_checkpoint, read_checkpoint


BASE = str(GOLDEN / "base")
WHOLE_MODEL = {
    "maple",
    "ivlp",
    "vpt",
    "promptsrc",
}  # saved with CLIP and all; the others save the prompt learner alone


def state_dict(case, base, dtype=torch.float32):
    """As the trainer of a case's method saves it."""
    ids = case["input_ids"]  # (C, 77)
    embeds = base.text_model.embeddings.token_embedding(ids).detach()
    learned = {key.removeprefix("param."): case[key] for key in case.tensors if key.startswith("param.")}
    n = learned["ctx"].shape[-2] if "ctx" in learned else 0
    buffers = {"token_prefix": embeds[:, :1], "token_suffix": embeds[:, 1 + n :]} if n else {}
    if case.info["method"] not in WHOLE_MODEL:
        tensors = {**learned, **buffers}
    else:
        is_part = re.compile(r"(image|text)_encoder\.")
        tensors = {name if is_part.match(name) else f"prompt_learner.{name}": value for name, value in learned.items()}
        tensors |= {f"prompt_learner.{name}": value for name, value in buffers.items()}
        tensors |= {"logit_scale": base.logit_scale.detach(), "image_encoder.proj": torch.ones(64, 48)}
        tensors |= {"image_encoder.transformer.resblocks.0.ln_1.weight": torch.ones(64)}
    if case.info["method"] == "promptsrc":
        tensors["prompt_learner.ZS_image_encoder.proj"] = torch.ones(64, 48)
    return {name: value.to(dtype) for name, value in tensors.items()}


def save(path, tensors):
    """With optimizer and schedule, live objects included, as Dassl saves them."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.002, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    torch.save(
        {
            "state_dict": tensors,
            "epoch": 50,
            "optimizer": optimizer.state_dict(),
            "scheduler": {"successor": successor, "warmup_epoch": 1, "last_epoch": 50},
            "val_result": 81.25,
        },
        path,
    )
    return path


def template_of(case):
    return "a photo of a {}." if case.info["prompts"][0].startswith("a photo of a ") else "{}."


@pytest.fixture(scope="module")
def base():
    return CLIPModel.from_pretrained(BASE)


def convert(case, path, **options):
    options = {"class_names": case.info["classnames"], "prompt_template": template_of(case), **options}
    return convert_checkpoint(path, BASE, **options)


CASES = [
    "coop_shared_end_n16",
    "coop_csc_middle_n4",
    "coop_shared_front_punctuation",
    "coop_ctxinit_end",
    "cocoop_ctxinit",
    "kgcoop_ctxinit_w8",
    "prograd_projected_n4",
    "maple_ctxinit_n2_depth3",
    "maple_n4_depth1_shallow",
    "ivlp_deep_t3_v4",
    "ivlp_text_only_deep_t4_v0",
    "vpt_deep_n3_d5",
    "vpt_shallow_n4",
    "promptsrc_random_n2",
]


@pytest.mark.parametrize("name", CASES)
def test_a_converted_checkpoint_computes_the_authors_logits(base, tmp_path, name):
    case = GoldenCase(name)
    path = save(tmp_path / "model.pth.tar-50", state_dict(case, base))
    position = case.info["settings"].get("class_token_position", "end")
    convert(case, path, class_token_position=position).save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter").eval()
    logits = model(pixel_values=case.pixel_values).logits.detach()
    torch.testing.assert_close(logits, case["logits"], atol=case.info["tolerances"]["logits_atol"], rtol=0)


def test_half_precision_and_several_devices_leave_their_traces_and_are_read_as_well(base, tmp_path):
    case = GoldenCase("coop_ctxinit_end")
    tensors = {f"module.{name}": value for name, value in state_dict(case, base, torch.float16).items()}
    model = convert(case, save(tmp_path / "model.pth.tar-50", tensors))
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    torch.testing.assert_close(
        model(pixel_values=case.pixel_values).logits.detach(), case["logits"], atol=0.05, rtol=0
    )


def test_the_command_writes_an_adapter_folder(base, run_here, tmp_path):
    case = GoldenCase("maple_n2_depth3")
    path = save(tmp_path / "model.pth.tar-5", state_dict(case, base))
    options = [
        "--base_model_name_or_path",
        BASE,
        "--prompt_template",
        "{}.",
        "--class_names",
        *case.info["classnames"],
    ]
    assert "learned numbers" in run_here("convert", path, "adapter", *options)
    model = AutoPeftModelForPromptClassification.from_pretrained(tmp_path / "adapter").eval()
    logits = model(pixel_values=case.pixel_values).logits.detach()
    torch.testing.assert_close(logits, case["logits"], atol=case.info["tolerances"]["logits_atol"], rtol=0)


@pytest.mark.slow
def test_the_commit_of_a_revision_is_recorded(base, tmp_path):
    case = GoldenCase("coop_shared_end_n4")
    path = save(tmp_path / "model.pth.tar-50", state_dict(case, base))
    arguments = (path, "adapter", "--base_model_name_or_path", "me/clip", "--prompt_template", template_of(case))
    with HubStandIn() as hub:
        hub.repos["me/clip"] = {"README.md": b"Moved."}
        hub.branches["me/clip", "v2"] = {file.name: file.read_bytes() for file in Path(BASE).iterdir()}
        env = {**hub.client_environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        code, _, errors = run_command("convert", *arguments, folder=tmp_path, env=env)
        assert code == 1 and "me/clip" in errors and "Traceback" not in errors
        code, _, errors = run_command("convert", *arguments, "--model_revision", "v2", folder=tmp_path, env=env)
        assert code == 0, errors
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/clip", hub.commit_id("me/clip", "v2"))


def test_the_command_says_what_is_wrong_without_a_traceback(run_here, tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "model.pth.tar-5")
    with pytest.raises(SystemExit, match="^clip-prompt convert: error: .* holds no prompts that are known here"):
        run_here("convert", "model.pth.tar-5", "adapter", "--base_model_name_or_path", BASE)
    assert not (tmp_path / "adapter").exists()


def test_shared_vectors_need_no_class_names(base, tmp_path):
    case = GoldenCase("coop_shared_end_n4")
    path = save(tmp_path / "model.pth.tar-50", state_dict(case, base))
    model = convert(case, path, class_names=None)
    model.get_base_model().set_class_names(["cat", "yurt"])
    assert model(pixel_values=case.pixel_values).logits.shape == (6, 2)


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_could_run_code_is_refused_and_runs_none(base, tmp_path):
    case, proof = GoldenCase("coop_shared_end_n4"), tmp_path / "proof"
    content = {"state_dict": state_dict(case, base), "val_result": RunsCode(f"touch {proof}")}
    torch.save(content, tmp_path / "model.pth.tar-50")
    with pytest.raises(ValueError, match="a pickle can run code when it is opened, and this one holds more than"):
        convert(case, tmp_path / "model.pth.tar-50")
    assert not proof.exists()


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "model.pth.tar-50")
    with pytest.raises(ValueError, match="holds no 'state_dict' of tensors"):
        read_checkpoint(tmp_path / "model.pth.tar-50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["cat", "golden retriever"]}, "is of 5 classes, but 2 are given; give the class names"),
        ({"prompt_template": "a photo of a {}, too."}, "not trained with the text 'X.*, too.' .*check_prompts=False"),
    ],
)
def test_other_texts_than_in_training_are_noticed(base, tmp_path, options, message):
    case = GoldenCase("coop_shared_end_n16")
    path = save(tmp_path / "model.pth.tar-50", state_dict(case, base))
    with pytest.raises(ValueError, match=message):
        convert(case, path, **options)
    convert(case, path, **options, check_prompts=False)


def test_classes_in_another_order_are_noticed(base, tmp_path):
    case = GoldenCase("coop_shared_end_n16")
    path = save(tmp_path / "model.pth.tar-50", state_dict(case, base))
    with pytest.raises(ValueError, match="not trained with the text"):
        convert(case, path, class_names=case.info["classnames"][::-1])


def test_another_base_model_is_refused_by_the_shapes(base, tmp_path):
    case = GoldenCase("vpt_shallow_n4")
    path = save(tmp_path / "model.pth.tar-5", state_dict(case, base))
    with pytest.raises(
        ValueError, match=r"vision_model.embeddings.*has shape \(4, 64\), the base model .* \(4, 160\)"
    ):
        convert_checkpoint(path, TINY_CLIP, case.info["classnames"])
