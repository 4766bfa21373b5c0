"""An adapter tells whether the model that it is loaded into is the one that it was trained on."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
from adapters import as_if_trained, change_config, tuned
from conftest import CLASS_NAMES, GOLDEN, TINY_CLIP
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel, CLIPTextModel

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
)
from clip_prompt_peft.tuner.fingerprint import check_fingerprint, fingerprint_of
from clip_prompt_peft.tuner.hub import HubSettings


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def warnings_of(load):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught if "was trained on other weights" in str(w.message)]


def warnings_with(model, adapter):
    return warnings_of(lambda: PeftModel.from_pretrained(model, adapter))


def changed(clip, select, std=1e-3):
    """The model with the chosen tensors trained a little further."""
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if select(name):
                parameter += std * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return clip


def int8_round_trip(clip, dim):
    with torch.no_grad():
        for parameter in clip.parameters():
            table = parameter.reshape(len(parameter), -1) if parameter.ndim > 1 else parameter
            by_table = dim is None or parameter.ndim < 2
            largest = table.abs().max() if by_table else table.abs().amax(dim, keepdim=True)
            scale = largest.clamp_min(1e-12) / 127
            parameter.copy_(((table / scale).round() * scale).reshape(parameter.shape))
    return clip


class Packed(torch.Tensor):
    """A tensor that can do no more than be moved and detached."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.packed = tensor.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_it_is_small(adapter):
    fingerprint = json.loads((adapter / "adapter_config.json").read_text())["base_model_fingerprint"]
    assert len(json.dumps(fingerprint)) < 4096


class TestTheSameModel:
    def test_as_it_was(self, clip, adapter):
        assert warnings_with(clip, adapter) == []

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_another_precision(self, clip, adapter, dtype):
        assert warnings_with(clip.to(dtype), adapter) == []
        assert warnings_with(clip.float(), adapter) == []

    @pytest.mark.parametrize("dim", [None, 0, 1])
    def test_in_8_bit(self, clip, adapter, dim):
        assert warnings_with(int8_round_trip(clip, dim), adapter) == []

    @pytest.mark.parametrize("dim", [None, 1])
    def test_whole_under_an_adapter_of_an_8_bit_one(self, clip, tmp_path, dim):
        tuned(int8_round_trip(copy.deepcopy(clip), dim)).save_pretrained(tmp_path)
        assert warnings_with(clip, tmp_path) == []

    def test_of_values_that_half_precision_does_not_hold(self, classifier, tmp_path):
        """Those of the tiny CLIP are numbers of half precision, which are saved in half as many bytes."""
        tuned(changed(classifier, lambda name: True)).save_pretrained(tmp_path)
        fingerprint = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_fingerprint"]
        assert not fingerprint["values"]["text_model"].startswith("f2:")
        clip = changed(CLIPModel.from_pretrained(TINY_CLIP), lambda name: True)
        assert warnings_with(clip, tmp_path) == []
        assert warnings_with(changed(clip, lambda name: "layers.1" in name), tmp_path)

    def test_whole_under_an_adapter_of_a_half_precision_one(self, clip, tmp_path):
        tuned(copy.deepcopy(clip).bfloat16()).save_pretrained(tmp_path)
        assert warnings_with(clip, tmp_path) == []

    def test_saved_and_loaded_as_a_classifier(self, classifier, adapter, tmp_path):
        CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES).save_pretrained(tmp_path / "c")
        assert warnings_with(CLIPModel.from_pretrained(tmp_path / "c"), adapter) == []

    def test_as_a_text_tower_alone(self, adapter):
        assert warnings_with(CLIPTextModel.from_pretrained(TINY_CLIP), adapter) == []

    def test_inside_of_another_module(self, clip, adapter):
        assert warnings_with(torch.nn.ModuleDict({"clip": clip}), adapter) == []

    def test_with_a_larger_token_table(self, clip, adapter):
        embeddings = clip.text_model.embeddings
        rows = torch.cat([embeddings.token_embedding.weight, torch.zeros(64, 128)])
        embeddings.token_embedding = torch.nn.Embedding.from_pretrained(rows)
        assert warnings_with(clip, adapter) == []

    def test_beside_other_adapters(self, classifier, adapter, tmp_path):
        get_peft_model(
            CLIPModel.from_pretrained(TINY_CLIP), LoraConfig(target_modules=["q_proj"], r=2)
        ).save_pretrained(tmp_path / "lora")
        classifier.load_adapter(str(tmp_path / "lora"), "lora")
        assert warnings_with(classifier, adapter) == []
        model = PeftModel.from_pretrained(classifier, adapter, adapter_name="first")
        assert warnings_of(lambda: model.load_adapter(adapter, "second")) == []

    def test_without_values(self, clip, adapter):
        tensors = {name: tensor.to("meta") for name, tensor in clip.named_parameters() if "vision_model" in name}
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            setattr(clip.get_submodule(path), attribute, torch.nn.Parameter(tensor))
        assert warnings_with(clip, adapter) == []

    @pytest.mark.parametrize("num_rows", [3072 + 64, 3072 - 500])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_with_rows_added_to_or_taken_from_the_end_of_the_token_table(self, clip, adapter, num_rows, dtype):
        embeddings = clip.text_model.embeddings
        rows = torch.cat([embeddings.token_embedding.weight, torch.randn(64, 128)])[:num_rows]
        embeddings.token_embedding = torch.nn.Embedding.from_pretrained(rows)
        assert warnings_with(clip.to(dtype), adapter) == []

    @pytest.mark.parametrize("method", ["prompts", "lora"])
    def test_while_another_adapter_is_merged(self, classifier, adapter, method):
        lora = LoraConfig(target_modules=["q_proj", "token_embedding"])
        config = CLIPPromptTuningConfig() if method == "prompts" else lora
        model = as_if_trained(get_peft_model(classifier, config, adapter_name="other"))
        model.merge_adapter()
        classifier = model.get_base_model()
        assert warnings_of(lambda: classifier.load_adapter(str(adapter), "beside")) == []

    @pytest.mark.parametrize("name", FAMILIES)
    def test_of_each_family(self, name, tmp_path):
        family = FAMILIES[name]
        as_if_trained(get_peft_model(family.classifier(), CLIPPromptTuningConfig())).save_pretrained(tmp_path)
        assert warnings_with(family.classifier(), tmp_path) == []
        assert warnings_with(family.classifier().bfloat16(), tmp_path) == []
        other = family.classifier()
        table = other.get_input_embeddings().weight
        with torch.no_grad():
            table[len(table) // 2 :] *= 1.1
        (message,) = warnings_with(other, tmp_path)
        assert re.search(r"text_model.(token|word)_embeddings? differs in \d", message)

    @pytest.mark.parametrize("part", ["text_projection", "text_model.embeddings.token_embedding", "q_proj"])
    @pytest.mark.parametrize("kind", ["packed", "empty"])
    def test_with_tensors_whose_values_are_elsewhere(self, clip, adapter, part, kind):
        """Packed by a quantization, which cannot be indexed, or shared out over devices."""
        for name, module in clip.named_modules():
            if name.endswith(part):
                weight = Packed(module.weight.detach()) if kind == "packed" else torch.empty(0)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        config = CLIPPromptTuningConfig.from_pretrained(adapter)
        assert warnings_of(lambda: check_fingerprint(config.base_model_fingerprint, clip, "'a'", "'b'")) == []
        assert fingerprint_of(clip) is not None


class TestAnotherModel:
    @pytest.mark.parametrize(
        "part",
        [
            "text_model.",
            "vision_model.",
            "text_model.encoder.layers.2.",
            "logit_scale",
            "text_projection",
            "visual_proj",
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_trained_further_is_named_with_adapter_and_base(self, clip, adapter, part, dtype):
        model = changed(clip, lambda name: name.startswith(part), std=0.02).to(dtype)
        (message,) = warnings_with(model, adapter)
        assert str(adapter) in message and TINY_CLIP in message

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("table", "rows"),
        [
            ("text_model.embeddings.token_embedding", slice(None)),
            ("text_model.embeddings.token_embedding", slice(-60, None)),
            ("text_model.embeddings.position_embedding", slice(None)),
            ("text_model.embeddings.position_embedding", slice(-4, None)),
            ("vision_model.embeddings.position_embedding", slice(5, 7)),
        ],
    )
    def test_of_which_only_rows_of_a_table_were_trained(self, clip, adapter, table, rows, dtype):
        with torch.no_grad():
            clip.get_submodule(table).weight[rows] *= 1.05
        (message,) = warnings_with(clip.to(dtype), adapter)
        tower, _, name = table.partition(".embeddings.")
        assert re.search(rf"compared, {tower}.{name} differs in \d+\. Its predictions", message)

    @pytest.mark.parametrize("word", ["photo", "vehicle"])
    def test_of_which_only_a_token_of_the_adapter_was_trained(self, clip, adapter, tokenizer, word):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            clip.text_model.embeddings.token_embedding.weight[token] *= 1.05
        assert warnings_with(clip, adapter)

    @pytest.mark.slow
    def test_of_which_one_tensor_was_trained(self, clip, adapter):
        config = CLIPPromptTuningConfig.from_pretrained(adapter)
        unnoticed = []
        for name, parameter in clip.named_parameters():
            before = parameter.data.clone()
            parameter.data *= 1.05
            if not warnings_of(lambda: check_fingerprint(config.base_model_fingerprint, clip, "'a'", "'b'")):
                unnoticed.append(name)
            parameter.data = before
        assert unnoticed == []

    def test_of_random_weights(self, clip, adapter):
        assert warnings_with(CLIPModel(clip.config), adapter)

    def test_is_noticed_by_every_way_to_load(self, clip, adapter, tmp_path):
        other = changed(CLIPForPromptClassification.from_pretrained(TINY_CLIP), lambda name: True)
        other.save_pretrained(tmp_path / "other")
        change_config(adapter, base_model_name_or_path=str(tmp_path / "other"))
        assert warnings_of(lambda: AutoPeftModelForPromptClassification.from_pretrained(adapter))
        assert warnings_of(lambda: CLIPForPromptClassification.from_pretrained(adapter))
        assert warnings_of(lambda: CLIPModel.from_pretrained(tmp_path / "other").load_adapter(str(adapter)))

    def test_with_more_layers_of_the_same_size(self, clip, adapter):
        config = copy.deepcopy(clip.config.text_config)
        config.num_hidden_layers += 1
        (message,) = warnings_with(CLIPTextModel(config), adapter)
        assert "text_model has another number of layers" in message

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("part", ["text_model.encoder.layers.2.", "text_projection", "visual_projection"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_one_part_changed_by_a_thousandth(self, clip, adapter, part, dtype, seed):
        factor = (10 if "projection" in part else 3) if dtype is torch.bfloat16 else 1  # it rounds by up to 0.4 %
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in clip.named_parameters():
                if name.startswith(part):
                    parameter *= 1 + 1e-3 * factor * torch.randn(parameter.shape, generator=generator)
        assert warnings_with(clip.to(dtype), adapter)


class TestVersions:
    """Adapters of an earlier version are compared as they were then, and those of a later one are not compared."""

    @pytest.fixture
    def of_version_1(self, adapter):
        fingerprint = json.loads((GOLDEN / "fingerprint_of_version_1.json").read_text())
        assert "version" not in fingerprint
        change_config(adapter, base_model_fingerprint=fingerprint)
        return adapter

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_the_first_one(self, clip, of_version_1, dtype):
        assert warnings_with(clip.to(dtype), of_version_1) == []
        assert warnings_with(changed(clip, lambda name: "layers.1" in name, std=0.02), of_version_1)

    def test_the_first_one_takes_the_first_rows_of_tables_only(self, clip, of_version_1):
        with torch.no_grad():
            clip.text_model.embeddings.token_embedding.weight[256:] *= 1.05
        assert warnings_with(clip, of_version_1) == []

    @pytest.mark.parametrize("content", [{}, {"values": 3}])
    @pytest.mark.parametrize("field", ["base_model_fingerprint", "tokenizer_fingerprint"])
    def test_a_later_one_is_skipped_with_a_warning(self, classifier, adapter, field, content):
        change_config(adapter, **{field: {"version": 7, **content}})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(classifier, adapter)
        (message,) = [str(w.message) for w in caught if "not checked" in str(w.message)]
        assert f"not checked: the adapter {str(adapter)!r} holds a {field} of version 7" in message
        assert model.peft_config["default"].to_dict()[field]["version"] == 7

    @pytest.mark.parametrize("version", ["2", 0, -1, 1.5, None, True])
    def test_what_is_no_version_is_refused(self, clip, adapter, version):
        change_config(adapter, base_model_fingerprint={"version": version, "values": {}, "per_tensor": 1})
        with pytest.raises(ValueError, match="base_model_fingerprint is damaged .version is"):
            PeftModel.from_pretrained(clip, adapter)


class TestAnAdapterWithoutAFingerprint:
    """Of an earlier version. Only names can tell."""

    def warned(self, clip, adapter, name, commit=None, **fields):
        change_config(adapter, base_model_fingerprint=None, **fields)
        clip.name_or_path = name
        clip.hub_settings = HubSettings(revision=commit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(clip, adapter)
        return [str(w.message) for w in caught if "was trained on" in str(w.message)]

    @pytest.mark.parametrize("name", [TINY_CLIP, "", "me/clip"])
    def test_of_the_same_name_or_in_a_folder(self, clip, adapter, name):
        assert self.warned(changed(clip, lambda name: True), adapter, name, base_model_name_or_path="me/clip") == []

    def test_of_the_same_commit_or_a_branch(self, clip, adapter):
        named = {"base_model_name_or_path": "me/clip"}
        assert self.warned(clip, adapter, "me/clip", "a" * 40, revision="a" * 40, **named) == []
        clip = CLIPModel.from_pretrained(TINY_CLIP)
        assert self.warned(clip, adapter, "me/clip", "a" * 40, revision="v2", **named) == []

    def test_another_name_or_commit_is_told(self, clip, adapter):
        named = {"base_model_name_or_path": "me/clip"}
        (message,) = self.warned(clip, adapter, "me/other", **named)
        assert "was trained on 'me/clip', and is loaded into 'me/other'." in message
        (message,) = self.warned(CLIPModel.from_pretrained(TINY_CLIP), adapter, "me/clip", "b" * 40, revision="a" * 40)
        assert f"trained on 'me/clip' at revision '{'a' * 40}', and is loaded into 'me/clip' at revision" in message


@pytest.mark.parametrize(
    "fingerprint",
    [
        {},
        {"values": 3},
        {"values": {"a": "?"}, "per_tensor": 1},
        {"version": 2, "values": {}, "per_tensor": 1, "rows": {"text_model.token_embedding": -1}},
        {"version": 2, "values": {}, "per_tensor": 1, "tokens": [-7]},
        {"version": 2, "values": {"text_model": "f2:AAA="}, "per_tensor": 1, "steps": {"text_model": "f2:"}},
        {"version": 2, "values": {}, "per_tensor": 1, "tokens": "abc"},
        7,
    ],
)
def test_a_damaged_fingerprint_is_refused(clip, adapter, fingerprint):
    change_config(adapter, base_model_fingerprint=fingerprint)
    with pytest.raises(ValueError, match="base_model_fingerprint"):
        PeftModel.from_pretrained(clip, adapter)
