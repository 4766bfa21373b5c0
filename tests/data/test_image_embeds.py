"""Tests of precomputed image embeddings: computed once, and never those of another model."""

import os

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import EMOJI, TINY_CLIP
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from torch.nn.utils import parametrize
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.data import cache_image_embeds, load_image_dataset, with_pixel_values


@pytest.fixture
def dataset(tmp_path):
    """Five images with their own cache folder."""
    files = {"train": str(EMOJI / "noto-train.parquet")}
    return load_image_dataset(files=files, cache_dir=str(tmp_path))["train"].select(range(5))


def count_runs(model, runs):
    compute = model.get_image_features  # not a hook, with which nothing is read from the cache

    def count(**inputs):
        runs.append(len(inputs["pixel_values"]))
        return compute(**inputs)

    model.get_image_features = count


@pytest.fixture
def tower_runs(classifier):
    """The number of images in each forward pass of the image tower."""
    runs = []
    count_runs(classifier, runs)
    return runs


def test_embeddings_give_the_logits_of_their_images(classifier, dataset, image_processor):
    embeds = cache_image_embeds(dataset, classifier, image_processor, batch_size=2)
    pixel_values = torch.stack(with_pixel_values(dataset, image_processor)[:]["pixel_values"])
    with torch.no_grad():
        from_pixels = classifier(pixel_values=pixel_values).logits
        from_embeds = classifier(image_embeds=embeds[:]["image_embeds"]).logits
    torch.testing.assert_close(from_embeds, from_pixels)
    assert embeds[:]["labels"].tolist() == list(dataset["label"])
    assert embeds.features["labels"].names == dataset.features["label"].names


def test_half_precision_takes_half_the_space(classifier, dataset, image_processor):
    full = cache_image_embeds(dataset, classifier, image_processor)[:]["image_embeds"]
    half = cache_image_embeds(dataset, classifier, image_processor, dtype="float16")
    assert half.features["image_embeds"].feature.dtype == "float16"
    torch.testing.assert_close(half[:]["image_embeds"].float(), full, rtol=1e-3, atol=1e-3)


def test_the_trainer_accepts_them(classifier, dataset, image_processor, tmp_path):
    classifier.set_class_names(dataset.features["label"].names)
    train_set = cache_image_embeds(dataset, classifier, image_processor)
    args = TrainingArguments(tmp_path, max_steps=2, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(get_peft_model(classifier, CLIPPromptTuningConfig()), args, train_dataset=train_set)
    assert trainer.train().global_step == 2


class TestSecondRun:
    def test_does_not_run_the_image_tower(self, classifier, dataset, image_processor, tower_runs):
        first = cache_image_embeds(dataset, classifier, image_processor)
        assert sum(tower_runs) == 5
        again = CLIPForPromptClassification.from_pretrained(TINY_CLIP)  # another object with the same weights
        count_runs(again, tower_runs)
        second = cache_image_embeds(dataset, again, image_processor)
        assert sum(tower_runs) == 5
        assert torch.equal(second[:]["image_embeds"], first[:]["image_embeds"])

    def test_is_not_confused_with_other_weights(self, classifier, dataset, image_processor, tower_runs):
        first = cache_image_embeds(dataset, classifier, image_processor)
        with torch.no_grad():
            classifier.visual_projection.weight[0, 0] += 1
        second = cache_image_embeds(dataset, classifier, image_processor)
        assert sum(tower_runs) == 10
        assert not torch.equal(second[:]["image_embeds"], first[:]["image_embeds"])

    def test_is_not_confused_with_other_classes_of_modules(self, classifier, dataset, image_processor):
        class Doubled(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        plain = cache_image_embeds(dataset, classifier, image_processor)[:]["image_embeds"]
        parametrize.register_parametrization(classifier.visual_projection, "weight", Doubled())
        doubled = cache_image_embeds(dataset, classifier, image_processor)[:]["image_embeds"]
        torch.testing.assert_close(doubled, 2 * plain)

    def test_is_not_confused_with_other_preprocessing(self, classifier, dataset, image_processor, tower_runs):
        cache_image_embeds(dataset, classifier, image_processor)
        other = AutoImageProcessor.from_pretrained(TINY_CLIP, image_mean=[0.5, 0.5, 0.5])
        cache_image_embeds(dataset, classifier, other)
        assert sum(tower_runs) == 10

    def test_is_not_confused_with_other_images(self, classifier, dataset, image_processor, tower_runs):
        cache_image_embeds(dataset, classifier, image_processor)
        cache_image_embeds(dataset.select([1, 0, 2, 3, 4]), classifier, image_processor)
        assert sum(tower_runs) == 10

    def test_is_not_confused_with_an_adapter_switched_off(self, classifier, dataset, image_processor, tower_runs):
        lora = LoraConfig(r=2, target_modules=r"vision_model.*q_proj", init_lora_weights=False, inference_mode=True)
        model = get_peft_model(classifier, lora)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        tuned = cache_image_embeds(dataset, model, image_processor)
        with model.disable_adapter():
            plain = cache_image_embeds(dataset, model, image_processor)
        assert sum(tower_runs) == 10
        assert not torch.allclose(tuned[:]["image_embeds"], plain[:]["image_embeds"])

    def test_serves_tuning_after_zero_shot(self, classifier, dataset, image_processor, tower_runs):
        cache_image_embeds(dataset, classifier, image_processor)
        model = get_peft_model(classifier, CLIPPromptTuningConfig())
        cache_image_embeds(dataset, model, image_processor)
        assert sum(tower_runs) == 5


def doubled(output):
    output.pooler_output = 2 * output.pooler_output
    return output


class TestHooks:
    """A hook can change the embeddings, and no hash shows what it does."""

    @pytest.fixture
    def embed(self, classifier, dataset, image_processor):
        return lambda: cache_image_embeds(dataset, classifier, image_processor)

    @pytest.mark.parametrize(
        ("part", "register", "hook"),
        [
            ("vision_model", "register_forward_hook", lambda module, args, output: doubled(output)),
            ("vision_model.encoder.layers.1", "register_forward_hook", lambda module, args, output: 2 * output),
            ("visual_projection", "register_forward_pre_hook", lambda module, args: (2 * args[0],)),
        ],
    )
    def test_their_embeddings_are_neither_read_from_the_cache_nor_left_in_it(
        self, classifier, embed, part, register, hook, caplog
    ):
        plain = embed()
        assert not caplog.records
        handle = getattr(classifier.get_submodule(part), register)(hook)
        hooked = [embed(), embed()]
        assert [record.message.split()[0] for record in caplog.records] == [repr(part)] * 2
        assert not torch.allclose(hooked[0][:]["image_embeds"], plain[:]["image_embeds"])
        assert torch.equal(hooked[1][:]["image_embeds"], hooked[0][:]["image_embeds"])
        assert not hooked[0].cache_files
        handle.remove()
        assert torch.equal(embed()[:]["image_embeds"], plain[:]["image_embeds"])

    def test_they_take_effect_where_nothing_was_computed_before(self, classifier, embed, tower_runs):
        handle = classifier.visual_projection.register_forward_hook(lambda module, args, output: 2 * output)
        hooked = embed()
        handle.remove()
        torch.testing.assert_close(hooked[:]["image_embeds"], 2 * embed()[:]["image_embeds"])
        assert sum(tower_runs) == 10

    def test_results_computed_from_them_are_not_confused_either(self, classifier, embed):
        """`datasets` finds those by the fingerprint of what they were computed from."""
        handle = classifier.visual_projection.register_forward_hook(lambda module, args, output: 2 * output)
        hooked = embed()
        handle.remove()
        assert hooked._fingerprint not in (embed()._fingerprint, embed()._fingerprint)

    def test_neither_are_those_of_a_module_with_another_forward(self, classifier, embed, caplog):
        plain, projection = embed(), classifier.visual_projection
        projection.forward = lambda states: 2 * type(projection).forward(projection, states)
        torch.testing.assert_close(embed()[:]["image_embeds"], 2 * plain[:]["image_embeds"])
        assert caplog.records[0].message.startswith("'visual_projection' has hooks or another forward")
        del projection.forward
        assert torch.equal(embed()[:]["image_embeds"], plain[:]["image_embeds"])

    def test_the_forward_of_accelerate_is_the_same_one(self, classifier, embed, tower_runs, caplog):
        embed()
        add_hook_to_module(classifier.visual_projection, ModelHook())
        embed()
        assert sum(tower_runs) == 5 and not caplog.records

    def test_those_of_the_text_side_and_of_transformers_do_not_matter(self, classifier, embed, tower_runs, caplog):
        embed()
        classifier.text_model.register_forward_hook(lambda module, args, output: None)
        classifier.enable_input_require_grads()  # hooks that ask for gradients, as gradient checkpointing adds them
        classifier.vision_model(torch.zeros(1, 3, 48, 48), output_hidden_states=True)  # and that collect states
        embed()
        assert sum(tower_runs) == 5 and not caplog.records


class TestViews:
    def test_each_access_draws_one_of_the_views(self, classifier, dataset, image_processor, tower_runs):
        views = cache_image_embeds(dataset, classifier, image_processor, num_views=3)
        assert sum(tower_runs) == 15
        rows = [torch.stack(list(views[:]["image_embeds"])) for _ in range(30)]
        assert rows[0].shape == (5, classifier.config.projection_dim)
        for image in range(5):
            assert len({tuple(row[image].tolist()) for row in rows}) == 3

    def test_the_views_do_not_depend_on_the_batch_size(self, classifier, dataset, image_processor):
        stored = [
            cache_image_embeds(dataset.select(range(size)), classifier, image_processor, batch_size=size, num_views=2)
            for size in (2, 3)
        ]
        first, second = (torch.tensor(views.with_format(None)[:2]["image_embeds"]) for views in stored)
        torch.testing.assert_close(first, second)

    def test_another_seed_gives_other_views(self, classifier, dataset, image_processor):
        first, second = (
            cache_image_embeds(dataset, classifier, image_processor, num_views=1, seed=seed) for seed in (0, 1)
        )
        assert not torch.allclose(first[0]["image_embeds"], second[0]["image_embeds"])

    def test_the_global_random_state_is_not_changed(self, classifier, dataset, image_processor):
        torch.manual_seed(0)
        cache_image_embeds(dataset, classifier, image_processor, num_views=2)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))

    def test_the_trainer_accepts_them(self, classifier, dataset, image_processor, tmp_path):
        classifier.set_class_names(dataset.features["label"].names)
        train_set = cache_image_embeds(dataset, classifier, image_processor, num_views=2)
        args = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
        trainer = Trainer(get_peft_model(classifier, CLIPPromptTuningConfig()), args, train_dataset=train_set)
        assert trainer.train().global_step == 2


class TestRefused:
    def test_an_image_tower_with_trained_lora(self, classifier, dataset, image_processor):
        model = get_peft_model(classifier, LoraConfig(r=2, target_modules=r"vision_model.*q_proj"))
        with pytest.raises(ValueError, match="vision_model|encoder.*lora_A"):
            cache_image_embeds(dataset, model, image_processor)

    def test_a_projection_that_is_trained(self, classifier, dataset, image_processor):
        classifier.requires_grad_(False)
        classifier.visual_projection.requires_grad_(True)
        with pytest.raises(ValueError, match="pixel_values"):
            cache_image_embeds(dataset, classifier, image_processor)

    def test_classes_in_another_order(self, classifier, dataset, image_processor):
        classifier.set_class_names(dataset.features["label"].names[::-1])
        with pytest.raises(ValueError, match="label 0 of the data set is 'animal', and class 11 of the model is"):
            cache_image_embeds(dataset, classifier, image_processor)
        with pytest.raises(ValueError, match="another order"):
            with_pixel_values(dataset, image_processor, class_names=classifier.class_names)

    def test_labels_that_are_no_numbers(self, classifier, dataset, image_processor):
        words = dataset.select_columns("image").add_column("label", list("abcde"))
        for prepare in (
            lambda: cache_image_embeds(words, classifier, image_processor),
            lambda: with_pixel_values(words, image_processor),
        ):
            with pytest.raises(ValueError, match="holds string.*class_encode_column"):
                prepare()

    @pytest.mark.parametrize("settings", [{"num_views": 0}, {"num_views": "many"}, {"dtype": "int8"}])
    def test_invalid_settings(self, classifier, dataset, image_processor, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            cache_image_embeds(dataset, classifier, image_processor, **settings)


def test_every_module_keeps_its_training_mode(classifier, dataset, image_processor):
    classifier.train().vision_model.encoder.eval()
    before = [module.training for module in classifier.modules()]
    cache_image_embeds(dataset, classifier, image_processor)
    assert [module.training for module in classifier.modules()] == before


@pytest.mark.usefixtures("own_datasets_cache")
def test_a_file_that_was_replaced_is_embedded_again(classifier, image_processor, tmp_path):
    PILImage.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "0.png")}], "label": [0]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        tmp_path / "rows.parquet"
    )

    def embed():
        images = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
        return cache_image_embeds(images, classifier, image_processor)[:]["image_embeds"]

    before = embed()
    assert torch.equal(embed(), before)
    PILImage.new("RGB", (8, 8), "blue").save(tmp_path / "0.png")
    os.utime(tmp_path / "0.png", (1, 1))
    assert not torch.allclose(embed(), before)
