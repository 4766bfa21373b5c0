"""Files of CLIP-LoRA's authors that are not as they should be, and where their layers belong."""

import os

import pytest
import torch
from conftest import GOLDEN, GoldenCase

from clip_prompt_peft import AutoModelForPromptClassification
from clip_prompt_peft.commands.convert import convert_checkpoint, main
from clip_prompt_peft.commands.convert_lora import layers_of


BASE = str(GOLDEN / "base")


def authors_file(encoder="vision", params=("q", "v"), position="up", num_layers=2, r=2, **metadata):
    """The content of a file for layers of the width of the base model's image tower."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    torch.manual_seed(0)
    of_layer = lambda: {  # noqa: E731
        names[name]: {"w_lora_A": torch.randn(r, 64), "w_lora_B": torch.randn(64, r)} for name in params
    }
    known = {"r": r, "alpha": 1, "encoder": encoder, "params": list(params), "position": position, **metadata}
    return {"weights": {f"layer_{i}": of_layer() for i in range(num_layers)}, "metadata": known}


def convert(content, tmp_path):
    torch.save(content, tmp_path / "lora_weights.pt")
    return convert_checkpoint(tmp_path / "lora_weights.pt", BASE)


# The tables of the authors' code
TWELVE = {
    "top1": [11],
    "top2": [10, 11],
    "top3": [9, 10, 11],
    "bottom": [0, 1, 2, 3],
    "mid": [4, 5, 6, 7],
    "up": [8, 9, 10, 11],
    "half-up": [6, 7, 8, 9, 10, 11],
    "half-bottom": [0, 1, 2, 3, 4, 5],
    "all": [*range(12)],
}


@pytest.mark.parametrize("position", TWELVE)
def test_a_position_is_that_of_the_authors_table(position):
    (layers,) = layers_of(position, 12)
    assert [*layers] == TWELVE[position]


def test_the_large_model_has_the_layers_of_either_version_of_the_table():
    assert layers_of("half-up", 24) == [range(12, 24), range(6, 12)]
    assert layers_of("half-bottom", 24) == [range(12), range(6)]
    assert layers_of("all", 24) == [range(24), range(21)]
    assert layers_of("up", 24)[1] == range(8, 12)


def test_a_tower_of_another_depth_is_guessed_and_the_user_is_told(tmp_path):
    with pytest.warns(UserWarning, match="no table for a vision tower of 5 layers; .* layers 3 to 4"):
        model = convert(authors_file(), tmp_path)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[5] for name in trained} == {"3", "4"} and len(trained) == 2 * 2 * 2


METADATA = {
    "r": [0, True, 2.0, "2"],
    "alpha": [0, float("nan"), float("inf"), None],
    "encoder": ["image", None],
    "params": [[], "qkv", ["q", "x"], None],
    "position": ["upper", 3, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in METADATA for value in METADATA[name]])
def test_odd_metadata_are_refused_with_their_value(name, value, tmp_path):
    with pytest.raises(
        ValueError, match=f"lora_weights.pt' is not converted: its metadata name .*{name}.*, not "
    ) as e:
        convert(authors_file(**{name: value}) if name not in ("r", "params") else changed(name, value), tmp_path)
    assert repr(value) in str(e.value)


def changed(name, value):
    content = authors_file()
    content["metadata"][name] = value
    return content


@pytest.mark.parametrize("name", METADATA)
def test_missing_metadata_are_named(name, tmp_path):
    content = authors_file()
    del content["metadata"][name]
    with pytest.raises(ValueError, match=f"its metadata lack {name}, so where the weights belong is not known"):
        convert(content, tmp_path)
    with pytest.raises(ValueError, match=r"holds weights, but no metadata \(r, alpha, encoder, params, position\)"):
        convert({"weights": content["weights"]}, tmp_path)


def without(content, *path):
    *parents, last = path
    place = content["weights"]
    for part in parents:
        place = place[part]
    del place[last]
    return content


def with_tensor(content, tensor):
    content["weights"]["layer_1"]["v_proj"]["w_lora_B"] = tensor
    return content


@pytest.mark.filterwarnings("ignore:The authors' code has no table")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (authors_file(num_layers=3), "LoRA for 3 layers, but the position 'up' with the encoder 'vision' is 2 of 5"),
        (authors_file("both", num_layers=3), "'both' is 2 of 4 text layers and 2 of 5 vision layers"),
        (authors_file(position="all", num_layers=4), "LoRA for 4 layers, but .* is 5 of 5 vision layers"),
        (without(authors_file(num_layers=3), "layer_1"), r"no weights of layer_0, .*but \['layer_0', 'layer_2'"),
        ({**authors_file(), "weights": [torch.ones(2)]}, "no weights of layer_0, .* but list"),
        (without(authors_file(), "layer_1", "v_proj"), r"'q_proj', 'v_proj'\] in 'layer_1'.*got \['q_proj'\]"),
        (changed("params", ["q", "k", "v"]), r"must hold \['k_proj', 'q_proj', 'v_proj'\] in 'layer_0'"),
        (without(authors_file(), "layer_0", "q_proj", "w_lora_A"), "w_lora_A and w_lora_B in 'layer_0', 'q_proj'"),
        (with_tensor(authors_file(), [1.0]), "something else than tensors in 'layer_1', 'v_proj'"),
        (with_tensor(authors_file(), torch.full((64, 2), torch.nan)), "layers.4.self_attn.v_proj.lora_B.*holds NaN"),
        (with_tensor(authors_file(), torch.ones(64, 2, dtype=torch.int32)), "is of torch.int32, not of floating"),
        (with_tensor(authors_file(), torch.ones(2, 64)), r"v_proj.lora_B.* has shape \(2, 64\), .* ask for \(64, 2\)"),
        (authors_file("text"), r"text_model.* has shape \(.*64.*\), .* ask for \(.*128.*\)"),
        (changed("r", 3), r"has shape \(.*2.*\), .* ask for \(.*3.*\)"),
    ],
)  # fmt: skip
def test_other_weights_than_the_metadata_and_the_model_ask_for_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(content, tmp_path)


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_could_run_code_is_refused_and_runs_none(tmp_path):
    content, proof = authors_file(), tmp_path / "proof"
    content["metadata"]["position"] = RunsCode(f"touch {proof}")
    with pytest.raises(ValueError, match="a pickle can run code when it is opened"):
        convert(content, tmp_path)
    assert not proof.exists()


def test_half_precision_is_read_as_well(tmp_path):
    content = authors_file(position="bottom")
    half = content["weights"]["layer_0"]["q_proj"]["w_lora_A"].half()
    content["weights"]["layer_0"]["q_proj"]["w_lora_A"] = half
    with pytest.warns(UserWarning, match="no table"):
        parameters = dict(convert(content, tmp_path).named_parameters())
    name = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert parameters[name].dtype is torch.float32 and torch.equal(parameters[name], half.float())


@torch.no_grad()
def test_the_command_writes_an_adapter_of_peft_and_says_how_to_load_it(tmp_path, capsys):
    case, file = GoldenCase("clip_lora_r2_qkv_both"), GoldenCase("clip_lora_r2_qkv_both_file")
    content = {"weights": {}, "metadata": file.info["pt_structure"]["metadata"]}
    for key, tensor in file.tensors.items():
        _, layer, projection, matrix = key.split(".")
        content["weights"].setdefault(layer, {}).setdefault(projection, {})[matrix] = tensor
    torch.save(content, tmp_path / "lora_weights.pt")
    main([str(tmp_path / "lora_weights.pt"), str(tmp_path / "adapter"), "--base_model_name_or_path", BASE])
    printed = capsys.readouterr().out
    assert "learned numbers" in printed and "AutoModelForPromptClassification" in printed
    names = case.info["classnames"]
    model = AutoModelForPromptClassification.from_pretrained(tmp_path / "adapter", class_names=names).eval()
    logits = model(pixel_values=case.pixel_values).logits * 100 / model.logit_scale.exp()
    torch.testing.assert_close(logits, case["logits"], atol=case.info["tolerances"]["logits_atol"], rtol=0)


def test_the_command_says_what_is_wrong_and_writes_nothing(run_here, tmp_path):
    torch.save(changed("r", True), tmp_path / "lora_weights.pt")
    with pytest.raises(SystemExit, match="^clip-prompt convert: error: 'lora_weights.pt' .* name the rank r=True"):
        run_here("convert", "lora_weights.pt", "adapter", "--base_model_name_or_path", BASE)
    assert not (tmp_path / "adapter").exists()
