"""The classifier: a CLIPModel that knows class names."""

import copy

import pytest
import torch
from adapters import as_if_trained, logits_of, randomize
from conftest import CLASS_NAMES, TINY_CLIP
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, pipeline

from clip_prompt_peft import (
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    check_label_names,
)


OTHER_NAMES = ["clock", "heart", "arrow"]


def tune(classifier, **fields):
    """As if it had been trained until the logits are other ones."""
    return as_if_trained(get_peft_model(classifier, CLIPPromptTuningConfig(**fields)).eval(), std=0.3)


@torch.no_grad()
def zero_shot_logits(clip, tokenizer, names, template, pixel_values):
    texts = tokenizer([template.format(name) for name in names], padding=True, return_tensors="pt")
    return clip(**texts, pixel_values=pixel_values).logits_per_image


@pytest.fixture
def image():
    return Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(TINY_CLIP)


class TestZeroShot:
    @pytest.mark.parametrize("template", ["a photo of a {}.", "{}", "{} seen from afar, at night"])
    def test_logits_are_those_of_clip_model_with_the_same_texts(self, clip, tokenizer, pixel_values, template):
        model = CLIPForPromptClassification.from_pretrained(
            TINY_CLIP, class_names=CLASS_NAMES, prompt_template=template
        ).eval()
        expected = zero_shot_logits(clip, tokenizer, CLASS_NAMES, template, pixel_values)
        torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=1e-6, atol=1e-6)

    def test_class_embeds_are_unit_vectors_of_the_projection_space(self, classifier):
        embeds = classifier.get_class_embeds()
        assert embeds.shape == (len(CLASS_NAMES), classifier.config.projection_dim)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(CLASS_NAMES)))

    def test_with_input_ids_the_forward_is_clip_models(self, classifier, clip, tokenizer, pixel_values):
        texts = tokenizer(["a cat", "two dogs", "a car"], padding=True, return_tensors="pt")
        with torch.no_grad():
            ours = classifier(**texts, pixel_values=pixel_values, return_loss=True)
            theirs = clip(**texts, pixel_values=pixel_values, return_loss=True)
        assert torch.equal(ours.logits_per_image, theirs.logits_per_image)
        assert torch.equal(ours.loss, theirs.loss)

    def test_return_dict_false_gives_a_tuple(self, classifier, pixel_values, labels):
        full = classifier(pixel_values=pixel_values, labels=labels)
        loss, logits = classifier(pixel_values=pixel_values, labels=labels, return_dict=False)
        assert torch.equal(loss, full.loss) and torch.equal(logits, full.logits)

    def test_loss_is_the_mean_cross_entropy_and_skips_ignored_labels(self, classifier, pixel_values):
        logits = logits_of(classifier, pixel_values)
        loss = classifier(pixel_values=pixel_values, labels=torch.tensor([2, -100, 0])).loss
        log_probs = logits.log_softmax(dim=-1)
        torch.testing.assert_close(loss, -(log_probs[0, 2] + log_probs[2, 0]) / 2)

    def test_hidden_states_of_the_image_tower_are_returned_on_request(self, classifier, pixel_values):
        output = classifier(pixel_values=pixel_values, output_hidden_states=True)
        assert len(output.hidden_states) == classifier.config.vision_config.num_hidden_layers + 1


class TestImageEmbeds:
    @pytest.fixture
    def image_embeds(self, clip, pixel_values):
        with torch.no_grad():
            return clip.get_image_features(pixel_values).pooler_output

    def test_give_the_logits_of_their_images(self, classifier, pixel_values, image_embeds):
        assert torch.equal(classifier(image_embeds=image_embeds).logits, classifier(pixel_values=pixel_values).logits)

    def test_may_be_normalised_or_not(self, classifier, image_embeds):
        unit = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(
            classifier(image_embeds=unit).logits, classifier(image_embeds=image_embeds).logits, rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_may_have_another_dtype_than_the_model(self, classifier, image_embeds, dtype):
        logits = classifier(image_embeds=image_embeds.to(dtype)).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, classifier(image_embeds=image_embeds).logits, atol=0.05, rtol=0)

    @pytest.mark.parametrize("shape", [(3, 64), (128,), (1, 3, 128)])
    def test_of_another_shape_are_refused(self, classifier, shape):
        with pytest.raises(ValueError, match=r"image_embeds must be \(B, 128\)"):
            classifier(image_embeds=torch.zeros(shape))


class TestClassNames:
    def test_can_be_exchanged(self, classifier, clip, tokenizer, pixel_values):
        classifier.set_class_names(OTHER_NAMES)
        expected = zero_shot_logits(clip, tokenizer, OTHER_NAMES, "a photo of a {}.", pixel_values)
        torch.testing.assert_close(logits_of(classifier, pixel_values), expected, rtol=1e-6, atol=1e-6)
        assert classifier.class_names == OTHER_NAMES
        assert classifier.config.id2label == {0: "clock", 1: "heart", 2: "arrow"}
        assert classifier.config.label2id == {"clock": 0, "heart": 1, "arrow": 2}
        assert classifier.config.num_labels == 3

    def test_of_the_active_adapter_are_exchanged_too_and_are_saved_with_it(self, classifier, pixel_values, tmp_path):
        model = tune(classifier)
        model.set_class_names(OTHER_NAMES)
        model.save_pretrained(tmp_path)
        again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path).eval()
        assert again.class_names == OTHER_NAMES
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))

    def test_stay_as_they_were_when_the_new_ones_are_refused(self, classifier, pixel_values):
        before = logits_of(classifier, pixel_values)
        with pytest.raises(ValueError, match="makes .* tokens, but the text tower has 77 positions"):
            classifier.set_class_names(["cat", "z" * 2000])
        assert classifier.class_names == CLASS_NAMES
        assert torch.equal(logits_of(classifier, pixel_values), before)

    @pytest.mark.parametrize("bad", [[], "cat", ["cat", ""], ["cat", "cat"], ["cat", 3]])
    def test_that_are_no_list_of_different_words_are_refused_before_loading(self, bad):
        with pytest.raises(ValueError, match="class_names"):
            CLIPForPromptClassification.from_pretrained("no/such-checkpoint", class_names=bad)

    def test_are_asked_for_when_there_are_none(self, pixel_values):
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
        with pytest.raises(ValueError, match="no class names; call set_class_names"):
            model(pixel_values=pixel_values)

    def test_of_a_data_set_can_be_compared_with_the_models(self):
        check_label_names(CLASS_NAMES, tuple(CLASS_NAMES))
        with pytest.raises(ValueError, match="label 1 is 'food' in the data set and 'plant' in the model"):
            check_label_names(["animal", "food", "plant", "vehicle"], CLASS_NAMES)
        with pytest.raises(ValueError, match=r"1 are unknown to the model \(\['fungus'\]\).*\['vehicle'\]"):
            check_label_names(["animal", "plant", "food", "fungus"], CLASS_NAMES)

    def test_in_another_order_are_put_right_as_the_error_says(self, classifier):
        features = Features({"label": ClassLabel(names=CLASS_NAMES[::-1]), "name": Value("string")})
        dataset = Dataset.from_dict({"label": [0, 3], "name": ["vehicle", "animal"]}, features=features)
        with pytest.raises(ValueError, match="align_labels_with_mapping"):
            check_label_names(dataset.features["label"].names, classifier.class_names)
        dataset = dataset.align_labels_with_mapping(classifier.config.label2id, "label")
        check_label_names(dataset.features["label"].names, classifier.class_names)
        assert [classifier.config.id2label[row["label"]] for row in dataset] == dataset["name"][:]


class TestBadInput:
    def test_both_or_neither_of_images_and_embeddings(self, classifier, pixel_values):
        with pytest.raises(ValueError, match="not both"):
            classifier(pixel_values=pixel_values, image_embeds=torch.zeros(3, 128))
        with pytest.raises(ValueError, match="got neither"):
            classifier()

    def test_labels_together_with_input_ids(self, classifier, labels):
        with pytest.raises(ValueError, match="leave input_ids out to classify"):
            classifier(input_ids=torch.tensor([[3070, 5, 3071]]), labels=labels)

    @pytest.mark.parametrize("bad", [4, -1])
    def test_labels_out_of_range(self, classifier, pixel_values, bad):
        with pytest.raises(ValueError, match=f"Label {bad} is out of range: the model has 4 classes"):
            classifier(pixel_values=pixel_values, labels=torch.tensor([0, bad, 1]))

    @pytest.mark.parametrize("template", ["a photo", "a {} of a {}", 7])
    def test_a_template_without_exactly_one_slot_before_loading(self, template):
        with pytest.raises(ValueError, match="template"):
            CLIPForPromptClassification.from_pretrained("no/such-checkpoint", prompt_template=template)

    def test_a_checkpoint_without_the_weights_of_a_clip(self, clip, tmp_path):
        text_tower = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("text_")}
        clip.save_pretrained(tmp_path, state_dict=text_tower)
        with pytest.raises(ValueError, match="is not a CLIP checkpoint"):
            CLIPForPromptClassification.from_pretrained(tmp_path, class_names=CLASS_NAMES)

    def test_no_tokenizer_anywhere(self, clip):
        clip.name_or_path = clip.config._name_or_path = ""
        with pytest.raises(ValueError, match="needs a tokenizer"):
            CLIPForPromptClassification.from_clip(clip, class_names=CLASS_NAMES)


class TestFromAndToClip:
    def test_share_their_modules_with_the_clip_model(self, clip, tokenizer, pixel_values):
        model = CLIPForPromptClassification.from_clip(clip, tokenizer, CLASS_NAMES)
        assert {id(p) for p in model.parameters()} == {id(p) for p in clip.parameters()}
        assert {id(p) for p in model.to_clip().parameters()} == {id(p) for p in clip.parameters()}
        expected = zero_shot_logits(clip, tokenizer, CLASS_NAMES, "a photo of a {}.", pixel_values)
        torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=1e-6, atol=1e-6)

    def test_leave_the_clip_model_as_it_was(self, clip, tokenizer):
        before = clip.config.to_dict()
        CLIPForPromptClassification.from_clip(clip, tokenizer, CLASS_NAMES)
        assert clip.config.to_dict() == before
        assert not clip.training

    def test_to_clip_refuses_while_an_adapter_is_in_the_model(self, classifier, clip, pixel_values, tokenizer):
        model = tune(classifier)
        with pytest.raises(ValueError, match=r"adapters \['default'\] are still in the model"):
            classifier.to_clip()
        texts = tokenizer(["a photo of a cat."], return_tensors="pt")
        plain = model.unload().to_clip()
        assert type(plain) is CLIPModel
        assert torch.equal(
            plain(**texts, pixel_values=pixel_values).logits_per_image,
            clip(**texts, pixel_values=pixel_values).logits_per_image,
        )

    def test_from_clip_takes_an_adapter_along(self, clip, tokenizer, pixel_values, tmp_path):
        clip.add_adapter(CLIPPromptTuningConfig(tokenizer_name_or_path=TINY_CLIP))
        torch.nn.init.normal_(clip.text_model.embeddings.learnable_embeddings["default"])
        model = CLIPForPromptClassification.from_clip(clip, tokenizer, CLASS_NAMES)
        with pytest.raises(ValueError, match="still in the model"):
            model.to_clip()
        model.save_pretrained(tmp_path)
        again = CLIPForPromptClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))

    def test_every_module_keeps_its_training_mode(self, clip, tokenizer):
        clip.train().vision_model.eval()
        before = {name: module.training for name, module in clip.named_modules()}
        model = CLIPForPromptClassification.from_clip(clip, tokenizer, CLASS_NAMES)
        assert {name: module.training for name, module in model.named_modules() if name in before} == before
        assert {name: module.training for name, module in model.to_base().named_modules()} == before

    def test_from_clip_refuses_what_is_no_clip_model(self, clip, tokenizer):
        model = get_peft_model(clip, CLIPPromptTuningConfig())
        with pytest.raises(TypeError, match="PeftModel.*pass get_base_model()"):
            CLIPForPromptClassification.from_clip(model, tokenizer, CLASS_NAMES)


class TestSaving:
    def test_a_saved_classifier_gives_the_same_logits_and_brings_its_tokenizer(self, pixel_values, tmp_path):
        model = CLIPForPromptClassification.from_pretrained(
            TINY_CLIP, class_names=OTHER_NAMES, prompt_template="an icon of a {}"
        ).eval()
        model.save_pretrained(tmp_path)
        again = CLIPForPromptClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))
        assert again.class_names == OTHER_NAMES and again.prompt_template == "an icon of a {}"
        assert again.config.id2label == dict(enumerate(OTHER_NAMES)) and again.config.num_labels == 3
        assert (tmp_path / "tokenizer.json").exists()

    def test_the_labels_saved_are_those_of_the_classes_in_use(self, classifier, pixel_values, tmp_path):
        model = tune(classifier, class_names=OTHER_NAMES)
        model(pixel_values=pixel_values)
        assert classifier.config.num_labels == 3
        model.unload().save_pretrained(tmp_path)
        assert CLIPForPromptClassification.from_pretrained(tmp_path).config.id2label == dict(enumerate(CLASS_NAMES))

    def test_a_deepcopy_is_independent(self, classifier, pixel_values):
        twin = copy.deepcopy(classifier)
        before = logits_of(classifier, pixel_values)
        assert torch.equal(logits_of(twin, pixel_values), before)
        twin.set_class_names(OTHER_NAMES)
        tune(twin)
        assert torch.equal(logits_of(classifier, pixel_values), before)


class TestWithAdapters:
    def test_a_new_adapter_is_the_zero_shot_classifier(self, classifier, pixel_values):
        before = logits_of(classifier, pixel_values)
        model = get_peft_model(classifier, CLIPPromptTuningConfig()).eval()
        torch.testing.assert_close(logits_of(model, pixel_values), before, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("n", [2, 4, 7])
    def test_disabling_gives_the_zero_shot_logits_exactly(self, classifier, pixel_values, n):
        before = logits_of(classifier, pixel_values)
        model = tune(classifier, num_virtual_tokens=n)
        assert not torch.allclose(logits_of(model, pixel_values), before, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, pixel_values), before)
        assert not torch.allclose(logits_of(model, pixel_values), before, atol=1e-2)

    def test_switching_adapters_switches_prompts_and_classes(self, classifier, pixel_values):
        model = tune(classifier)
        first = logits_of(model, pixel_values)
        model.add_adapter("other", CLIPPromptTuningConfig(prompt_template="an icon of {}", class_names=OTHER_NAMES))
        model.set_adapter("other")
        randomize(model, "other")
        assert logits_of(model, pixel_values).shape == (3, 3)
        assert model.class_names == OTHER_NAMES and model.config.id2label == dict(enumerate(OTHER_NAMES))
        model.set_adapter("default")
        assert torch.equal(logits_of(model, pixel_values), first)
        assert model.class_names == CLASS_NAMES and model.config.id2label == dict(enumerate(CLASS_NAMES))

    @pytest.mark.parametrize("n", [4, 7])
    def test_merging_keeps_logits_and_texts(self, classifier, pixel_values, tmp_path, n):
        model = tune(classifier, num_virtual_tokens=n)
        before = logits_of(model, pixel_values)
        template = model.active_peft_config.padded_template
        merged = model.merge_and_unload()
        assert type(merged) is CLIPForPromptClassification and merged.prompt_template == template
        torch.testing.assert_close(logits_of(merged, pixel_values), before, rtol=1e-5, atol=1e-5)
        merged.save_pretrained(tmp_path)
        again = CLIPForPromptClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(again, pixel_values), logits_of(merged, pixel_values))

    def test_lora_makes_it_a_lora_classifier(self, classifier, pixel_values):
        before = logits_of(classifier, pixel_values)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(classifier, config).eval()
        assert not torch.allclose(logits_of(model, pixel_values), before, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, pixel_values), before)

    def test_an_adapter_folder_alone_loads_as_a_classifier(self, classifier, pixel_values, tmp_path):
        model = tune(classifier)
        model.save_pretrained(tmp_path)
        again = CLIPForPromptClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))
        assert again.class_names == CLASS_NAMES

    def test_only_the_vectors_get_gradients(self, classifier, pixel_values, labels):
        model = tune(classifier)
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
        assert len(with_gradient) == 1 and "learnable_embeddings" in with_gradient[0]


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_base_gives_float32_logits_close_to_the_full_ones(self, classifier, pixel_values, dtype):
        half = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES, dtype=dtype).eval()
        logits = logits_of(half, pixel_values)
        assert half.dtype == dtype and logits.dtype == torch.float32
        torch.testing.assert_close(logits, logits_of(classifier, pixel_values), atol=0.1, rtol=0.02)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_base_trains_float32_vectors(self, pixel_values, labels, dtype):
        half = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES, dtype=dtype)
        model = tune(half)
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        vectors = half.text_model.embeddings.learnable_embeddings["default"]
        assert vectors.dtype == vectors.grad.dtype == torch.float32
        assert vectors.grad.isfinite().all() and vectors.grad.abs().max() > 0

    def test_autocast_leaves_the_logits_in_float32(self, classifier, pixel_values):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = logits_of(classifier, pixel_values)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, logits_of(classifier, pixel_values), atol=0.1, rtol=0.02)


class TestPositionalArguments:
    def test_the_order_of_the_family_is_refused_in_a_sentence(self, classifier, pixel_values, texts):
        with pytest.raises(ValueError, match="look like token ids: torch.int64 .*not input_ids as in CLIPModel"):
            classifier(texts.input_ids, pixel_values)
        with pytest.raises(ValueError, match="look like token ids"):
            classifier(texts.input_ids)

    def test_images_and_labels_are_the_first_two(self, classifier, pixel_values, labels):
        by_name = classifier(pixel_values=pixel_values, labels=labels)
        assert torch.equal(classifier(pixel_values, labels).loss, by_name.loss)


class TestPipeline:
    @pytest.mark.parametrize("tuned", [False, True], ids=["base", "peft_model"])
    def test_image_classification_names_the_most_probable_class(self, classifier, image, processor, tuned):
        model = tune(classifier) if tuned else classifier
        logits = logits_of(model, processor(image, return_tensors="pt").pixel_values)[0]
        answer = pipeline("image-classification", model=model, image_processor=processor)(image)
        assert answer[0]["label"] == CLASS_NAMES[logits.argmax()]
        scores = {entry["label"]: entry["score"] for entry in answer}
        expected = dict(zip(CLASS_NAMES, logits.softmax(dim=-1).tolist()))
        assert scores == pytest.approx(expected, abs=1e-6)


class TestFromAConfig:
    @pytest.fixture(params=["call", "_from_config", "from_pretrained"])
    def made(self, request, clip):
        clip.config.name_or_path = ""
        if request.param == "from_pretrained":
            state = clip.state_dict()
            return CLIPForPromptClassification.from_pretrained(None, config=clip.config, state_dict=state)
        make = CLIPForPromptClassification if request.param == "call" else CLIPForPromptClassification._from_config
        return make(clip.config)

    def test_it_has_the_defaults_and_can_be_saved(self, made, tmp_path):
        assert made.class_names is None and made.prompt_template == "a photo of a {}."
        made.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()

    def test_without_a_tokenizer_it_asks_for_one(self, made):
        with pytest.raises(ValueError, match="pass tokenizer=.* or set model.tokenizer"):
            made.set_class_names(["cat", "dog"])

    def test_with_a_tokenizer_it_works(self, made, tokenizer, pixel_values):
        made.tokenizer = tokenizer
        made.set_class_names(["cat", "dog"])
        assert made(pixel_values=pixel_values).logits.shape == (3, 2)

    @pytest.mark.parametrize("has_name", [False, True])
    def test_weights_in_memory_get_the_classes_of_the_config(self, clip, has_name, tokenizer, pixel_values):
        """And the tokenizer from where the config came, if that is known."""
        clip.config.class_names = ["cat", "dog"]
        if not has_name:
            clip.config.name_or_path = ""
        made = CLIPForPromptClassification.from_pretrained(None, config=clip.config, state_dict=clip.state_dict())
        assert made.class_names == ["cat", "dog"]
        if not has_name:
            with pytest.raises(ValueError, match="pass tokenizer=.* or set model.tokenizer"):
                made(pixel_values=pixel_values)
            made.tokenizer = tokenizer
        expected = CLIPForPromptClassification.from_base(clip, class_names=["cat", "dog"], tokenizer=tokenizer)
        assert torch.equal(logits_of(made.eval(), pixel_values), logits_of(expected, pixel_values))
        assert made.config.id2label == {0: "cat", 1: "dog"}
