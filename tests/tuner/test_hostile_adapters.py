"""Adapters that are damaged, or written by somebody who wants to do harm: refused, and nothing happens."""

import os
import pickle
import shutil
import sys

import hostile_adapters
import pytest
import torch
from adapters import change_config, change_tensors, tuned
from conftest import CLASS_NAMES, TINY_CLIP, slow_param
from hostile_adapters import CONFIG, FROZEN, WAYS, WEIGHTS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig


NUM_INPUTS = int(os.environ.get("NUM_HOSTILE_INPUTS", "120"))
QUICK = ("with_peft", "with_auto_class")
ALL = [way if way in QUICK else slow_param(way) for way in WAYS]
OURS = [way if way in QUICK else slow_param(way) for way in WAYS if way != "with_peft_into_clip"]


@pytest.fixture
def adapter(classifier, tmp_path):
    tuned(classifier).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_whatever_is_changed_in_an_adapter_it_is_refused_with_a_reason_or_works():
    counts, problems = hostile_adapters.try_inputs(NUM_INPUTS, seed=10)
    print(counts)
    assert not problems, problems[0]
    assert counts["refused"] > NUM_INPUTS / 3 and counts["works"] > 0


class TestFrozenWeights:
    @pytest.mark.parametrize("name", FROZEN)
    @pytest.mark.parametrize("way", ALL)
    def test_in_the_file_of_an_adapter_are_refused(self, adapter, way, name):
        save_file({**load_file(adapter / WEIGHTS), name: torch.full(FROZEN[name], 7.0)}, adapter / WEIGHTS)
        with pytest.raises(ValueError, match=r"hold '.*change the frozen model; .* not to be trusted"):
            WAYS[way](adapter)

    def test_of_a_classifier_that_others_use_are_not_changed(self, adapter):
        classifier = hostile_adapters.new_classifier()
        before = classifier.text_projection.weight.clone()
        name = "base_model.model.text_projection.weight"
        save_file({**load_file(adapter / WEIGHTS), name: torch.full(FROZEN[name], 7.0)}, adapter / WEIGHTS)
        with pytest.raises(ValueError, match="frozen"):
            classifier.load_adapter(adapter)
        assert torch.equal(classifier.text_projection.weight, before)
        assert not getattr(classifier, "peft_config", None)

    def test_that_the_configuration_names_to_be_saved_are_loaded(self, classifier, tmp_path):
        model = get_peft_model(classifier, CLIPPromptTuningConfig(modules_to_save=["text_projection"]))
        model.get_base_model().text_projection.weight.data.fill_(0.5)
        model.save_pretrained(tmp_path / "adapter")
        for way in ("with_peft", "with_auto_class"):
            assert (WAYS[way](tmp_path / "adapter").get_base_model().text_projection.weight == 0.5).all()


class TestTensors:
    @pytest.mark.parametrize("way", ALL)
    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (float("nan"), "NaN, Inf or"),
            (float("-inf"), "NaN, Inf or"),
            (1e30, "beyond"),
        ],
    )
    def test_that_are_no_usable_numbers_are_refused(self, adapter, way, value, said):
        change_tensors(adapter, lambda tensor: tensor.index_fill_(0, torch.tensor(1), value))
        with pytest.raises(ValueError, match=said):
            hostile_adapters.run(WAYS[way](adapter).eval())

    @pytest.mark.parametrize("way", OURS)
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_of_other_types_are_refused(self, adapter, way, dtype):
        change_tensors(adapter, lambda tensor: tensor.to(dtype))
        with pytest.raises(ValueError, match="not of floating point numbers"):
            WAYS[way](adapter)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_vision_virtual_tokens": 10**9}, "at most 1000, got 1000000000"),
        ({"num_virtual_tokens": -4}, "num_virtual_tokens must be a positive integer, got -4"),
        ({"num_virtual_tokens": 10**9, "replaced_token_ids": None}, "at most 1000, got 1000000000"),
        ({"start_idx": 10**30}, "positions"),
        ({"init_token_ids": ["a"]}, "init_token_ids must be a list of token ids"),
        ({"modules_to_save": [None]}, "modules_to_save must be a list of strings"),
        ({"target_modules": 0}, "target_modules must be a list of strings, or a string, got 0"),
        ({"regularizer": []}, r"regularizer must be a string, got \[\]"),
        ({"regularizer": "kgcoop", "regularizer_weights": "all"}, "regularizer_weights must be a dictionary"),
        ({"regularizer": "kgcoop", "teacher_templates": 2}, "teacher_templates must be a list of templates, got 2"),
        ({"class_specific": 1}, "class_specific must be True or False, got 1"),
        ({"class_names": "cat"}, "class_names must be a list of strings"),
        ({"class_names": {"cat": 1}}, "class_names must be a list of strings"),
        ({"class_names": [["cat"]]}, r"class_names\[0\] is \['cat'\] of type list"),
        ({"class_names": ["cat", "\ud800"]}, r"class_names\[1\] is '\\ud800', which is no text"),
        ({"prompt_template": "\udfff {}"}, "no text"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path must be a string"),
        ({"peft_type": {}}, "unknown method"),
    ],
)
@pytest.mark.parametrize("load", ["auto class", slow_param("classifier")])
def test_a_configuration_of_other_types_or_sizes_is_refused_by_what_is_wrong(adapter, fields, said, load):
    change_config(adapter, **fields)
    model_class = {"auto class": AutoPeftModelForPromptClassification, "classifier": CLIPForPromptClassification}[load]
    with pytest.raises(ValueError, match=said):
        model_class.from_pretrained(adapter)


def test_an_adapter_that_asks_for_gigabytes_is_refused_without_taking_them(classifier, tmp_path):
    hostile_adapters.make_good_adapters(tmp_path)
    folder = tmp_path / "per class"
    change_config(
        folder, class_names=[f"class {i}" for i in range(20_000)], num_virtual_tokens=60, replaced_token_ids=[5] * 60
    )
    before = hostile_adapters.resource.getrusage(hostile_adapters.resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"ask for \(20000, 60, 128\)"):  # 600 MB
        PeftModel.from_pretrained(classifier, folder)
    after = hostile_adapters.resource.getrusage(hostile_adapters.resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200_000  # KB


class TestCode:
    class Exploit:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return open, (self.path, "w")

    @pytest.mark.parametrize("way", ALL)
    def test_in_a_pickle_is_not_run(self, adapter, tmp_path, way):
        (adapter / WEIGHTS).unlink()
        torch.save({"x": self.Exploit(str(tmp_path / "ran"))}, adapter / "adapter_model.bin")
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
            WAYS[way](adapter)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("way", ALL)
    def test_named_in_auto_mapping_is_not_imported(self, adapter, tmp_path, way, monkeypatch):
        (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        change_config(adapter, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"})
        WAYS[way](adapter)
        assert "evil_module" not in sys.modules and not (tmp_path / "ran").exists()

    def test_beside_the_base_model_is_not_run_nor_asked_about(self, adapter, tmp_path):
        base = tmp_path / "base"
        shutil.copytree(TINY_CLIP, base)
        (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            path = base / file
            content = hostile_adapters.json.loads(path.read_text()) if path.exists() else {}
            path.write_text(hostile_adapters.json.dumps({**content, "auto_map": auto_map}))
        change_config(adapter, base_model_name_or_path=str(base))
        model = AutoPeftModelForPromptClassification.from_pretrained(adapter)
        assert model.class_names == CLASS_NAMES and not (tmp_path / "ran").exists()


class TestPaths:
    @pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "a\\b", "", ".", "a.b"])
    def test_in_the_name_of_an_adapter_are_refused(self, classifier, name):
        with pytest.raises(ValueError, match=r"cannot be named .*must not be empty nor hold"):
            get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name=name)
        model = get_peft_model(classifier, CLIPPromptTuningConfig())
        with pytest.raises(ValueError, match="cannot be named"):
            model.add_adapter(name, CLIPPromptTuningConfig())
        assert list(model.peft_config) == ["default"]

    def test_of_links_in_an_adapter_are_read_and_never_written(self, adapter, tmp_path, classifier):
        (tmp_path / "elsewhere").write_bytes((adapter / WEIGHTS).read_bytes())
        (adapter / WEIGHTS).unlink()
        (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
        before = (tmp_path / "elsewhere").read_bytes()
        model = AutoPeftModelForPromptClassification.from_pretrained(adapter, is_trainable=True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        model.save_pretrained(adapter)
        assert (tmp_path / "elsewhere").read_bytes() == before

    @pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
    def test_of_links_to_what_is_no_file_of_an_adapter_are_refused(self, adapter, file):
        (adapter / file).unlink()
        (adapter / file).symlink_to("/etc/passwd")
        with pytest.raises(ValueError, match="is damaged"):
            AutoPeftModelForPromptClassification.from_pretrained(adapter)


@pytest.mark.parametrize("script", ["predict"])
def test_the_example_refuses_a_hostile_adapter_in_one_line(adapter, run_here, tmp_path, script):
    from PIL import Image

    Image.new("RGB", (48, 48)).save(tmp_path / "cat.png")
    change_tensors(adapter, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(SystemExit) as exit:
        run_here(script, adapter, tmp_path / "cat.png")
    assert exit.value.code.startswith("clip-prompt predict: error: The adapter's") and "\n" not in exit.value.code


def test_the_service_refuses_a_hostile_adapter_and_goes_on(adapter, monkeypatch, tmp_path):
    pytest.importorskip("fastapi")
    monkeypatch.syspath_prepend(hostile_adapters.Path(TINY_CLIP).parent.parent)
    from fastapi import HTTPException

    from clip_prompt_peft.commands.service import AdapterStore

    shutil.copytree(adapter, tmp_path / "hostile")
    name = "base_model.model.logit_scale"
    save_file({**load_file(adapter / WEIGHTS), name: torch.tensor(7.0)}, tmp_path / "hostile" / WEIGHTS)
    store = AdapterStore(TINY_CLIP, tmp_path)
    with pytest.raises(HTTPException, match="422: .*'hostile' cannot be loaded: .*frozen model"):
        store.load("hostile")
    assert store.load("adapter") == CLASS_NAMES and list(store.loaded()) == ["adapter"]
