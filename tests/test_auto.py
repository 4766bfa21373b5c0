"""From an adapter's folder alone to a whole classifier."""

import pytest
import torch
from adapters import change_config, logits_of, tuned
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, CLIPModel

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    PeftModelForPromptClassification,
)


@pytest.fixture
def model(classifier):
    return tuned(classifier, num_virtual_tokens=6, prompt_template="an icon of a {}")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


class TestLoading:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_gives_logits_classes_and_template_of_the_saved_model(
        self, model, folder, pixel_values, low_cpu_mem_usage
    ):
        again = AutoPeftModelForPromptClassification.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert isinstance(again, PeftModelForPromptClassification)
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))
        assert again.class_names == CLASS_NAMES and again.prompt_template == "an icon of a {}"
        assert again.config.id2label == dict(enumerate(CLASS_NAMES))

    @pytest.mark.parametrize("name", ["class_names", "prompt_template"])
    def test_what_the_adapter_brings_cannot_be_given(self, folder, name):
        with pytest.raises(TypeError, match=rf"^{name} belongs to the adapter .* model.set_class_names"):
            AutoPeftModelForPromptClassification.from_pretrained(folder, **{name: "x"})

    def test_is_for_inference_unless_training_is_asked_for(self, folder):
        for_inference = AutoPeftModelForPromptClassification.from_pretrained(folder)
        assert not any(parameter.requires_grad for parameter in for_inference.parameters())
        to_train = AutoPeftModelForPromptClassification.from_pretrained(folder, is_trainable=True)
        assert [p.shape for p in to_train.parameters() if p.requires_grad] == [(6, 128)]

    def test_takes_name_dtype_and_tokenizer(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
        again = AutoPeftModelForPromptClassification.from_pretrained(
            folder, adapter_name="icons", dtype=torch.bfloat16, tokenizer=tokenizer
        )
        assert again.active_adapters == ["icons"] and again.dtype == torch.bfloat16
        assert again.get_base_model().tokenizer is tokenizer

    def test_finds_an_adapter_in_a_subfolder(self, classifier, tmp_path):
        get_peft_model(classifier, CLIPPromptTuningConfig(), adapter_name="icons").save_pretrained(tmp_path)
        again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path, subfolder="icons")
        assert again.class_names == CLASS_NAMES

    def test_takes_another_base_model_than_the_one_named(self, model, folder, pixel_values):
        change_config(folder, base_model_name_or_path="/gone/clip")
        again = AutoPeftModelForPromptClassification.from_pretrained(folder, base_model_name_or_path=TINY_CLIP)
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))

    def test_of_an_adapter_without_class_names_asks_for_them(self, tmp_path, pixel_values):
        get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CLIPPromptTuningConfig()).save_pretrained(tmp_path)
        again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no class names"):
            again(pixel_values=pixel_values)
        again.set_class_names(CLASS_NAMES)
        assert logits_of(again, pixel_values).shape == (3, len(CLASS_NAMES))

    def test_reads_the_adapter_of_a_classifier_that_transformers_put_it_into(self, folder, pixel_values, model):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
        classifier.load_adapter(folder)
        assert torch.equal(logits_of(classifier, pixel_values), logits_of(model, pixel_values))


class TestRefusals:
    def test_an_instance(self):
        with pytest.raises(OSError, match="from_pretrained"):
            AutoPeftModelForPromptClassification()

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            AutoPeftModelForPromptClassification.from_pretrained(str(tmp_path / "nowhere"))

    def test_a_folder_without_an_adapter(self):
        with pytest.raises(OSError, match="adapter_config.json"):
            AutoPeftModelForPromptClassification.from_pretrained(TINY_CLIP)

    def test_a_revision_of_a_folder(self, folder):
        with pytest.raises(ValueError, match="is a folder, which has no revision 'main'"):
            AutoPeftModelForPromptClassification.from_pretrained(folder, base_model_revision="main")

    def test_a_hub_id_that_cannot_be_reached_is_named(self, folder):
        with pytest.raises(OSError, match=r"config.json of 'me/nowhere' could not be loaded: We couldn't connect"):
            AutoPeftModelForPromptClassification.from_pretrained(folder, base_model_name_or_path="me/nowhere")

    def test_an_adapter_of_another_method(self, classifier, tmp_path):
        get_peft_model(classifier, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"of type .*LORA, not of CLIP prompt tuning.*class_names=\[\.\.\.\]"):
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path)

    def test_pickled_weights(self, model, tmp_path):
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").exists()
        with pytest.raises(ValueError, match="holds no adapter_model.safetensors.*pickles"):
            AutoPeftModelForPromptClassification.from_pretrained(tmp_path)

    @pytest.mark.parametrize("base", [None, ""])
    def test_an_adapter_that_names_no_base_model(self, folder, base):
        change_config(folder, base_model_name_or_path=base)
        with pytest.raises(ValueError, match="does not name its base model; pass base_model_name_or_path"):
            AutoPeftModelForPromptClassification.from_pretrained(folder)

    def test_a_base_model_of_another_machine(self, folder):
        change_config(folder, base_model_name_or_path="/home/somebody/clip")
        with pytest.raises(ValueError, match="'/home/somebody/clip', which is no folder of this machine"):
            AutoPeftModelForPromptClassification.from_pretrained(folder)

    @pytest.mark.parametrize("length", [0, 5, 200, -1])
    def test_weights_that_are_cut_off(self, folder, length):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
            AutoPeftModelForPromptClassification.from_pretrained(folder)

    @pytest.mark.parametrize("content", ["", "{", '{"peft_type": '])
    def test_a_config_that_is_cut_off(self, folder, content):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="adapter_config.json is damaged"):
            AutoPeftModelForPromptClassification.from_pretrained(folder)

    def test_a_base_model_of_another_width(self, folder, clip, tmp_path_factory, tokenizer):
        config = clip.config
        config.text_config.hidden_size, config.text_config.intermediate_size = 64, 64
        other = tmp_path_factory.mktemp("narrow")
        CLIPModel(config).save_pretrained(other)
        tokenizer.save_pretrained(other)
        with pytest.raises(ValueError, match=r"shape \(6, 128\), but this model .* \(6, 64\)"):
            AutoPeftModelForPromptClassification.from_pretrained(folder, base_model_name_or_path=str(other))
