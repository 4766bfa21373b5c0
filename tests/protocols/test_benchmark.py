"""Benchmark runs on the embedded images, and resuming them."""

import json

import numpy as np
import pytest
import torch
from conftest import EMOJI, TINY_CLIP
from peft import get_peft_model
from transformers import AutoImageProcessor

from clip_prompt_peft import CLIPForPromptClassification, method_config
from clip_prompt_peft.data import class_names_of, load_image_dataset, sample_few_shot, with_pixel_values
from clip_prompt_peft.protocols import (
    Backbone,
    Benchmark,
    Results,
    TrainingSettings,
    base_to_new,
    few_shot_curve,
    transfer,
)
from clip_prompt_peft.protocols.image_set import ImagePool


SETTINGS = TrainingSettings(num_train_epochs=1, when_fewer="all", ensemble="imagenet_simple")
METHODS = ["zero-shot", "ensemble", "linear-probe", "prompt-tuning"]


@pytest.fixture(scope="module")
def styles():
    names = ("fluenthc", "noto")
    return {
        name: load_image_dataset(files={split: str(EMOJI / f"{name}-{split}.parquet") for split in ("train", "test")})
        for name in names
    }


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP)
    return Backbone(model, AutoImageProcessor.from_pretrained(TINY_CLIP), SETTINGS)


@pytest.fixture
def open_benchmark(backbone, styles, tmp_path):
    def open_benchmark(folder="out", settings=SETTINGS, load_backbone=lambda: backbone):
        return Benchmark(load_backbone, styles, Results(tmp_path / folder, settings.fingerprint("tiny")))

    return open_benchmark


def all_runs():
    curve = few_shot_curve("fluenthc", METHODS, shots=(1, 2), seeds=(1,))
    return [
        *curve,
        *base_to_new("fluenthc", METHODS, (2,), (1,)),
        *transfer("fluenthc", ["noto"], METHODS, (2,), (1,)),
    ]


@pytest.fixture(scope="module")
def finished(backbone, styles, tmp_path_factory):
    """The results of all runs, for tests that do not change them."""
    folder = tmp_path_factory.mktemp("finished")
    results = Results(folder, SETTINGS.fingerprint("tiny"))
    Benchmark(lambda: backbone, styles, results).run(all_runs())
    return results


def lines_of(results):
    return [json.loads(line) for line in results.path.read_text().splitlines()]


def without_time(line):
    return {key: value for key, value in line.items() if key != "seconds"}


def test_zero_shot_is_what_plain_clip_answers(finished, styles, clip, tokenizer):
    run = next(run for run in all_runs() if run.method == "zero-shot" and "noto" in run.tests)
    dataset = styles["noto"]["test"]
    examples = with_pixel_values(dataset, AutoImageProcessor.from_pretrained(TINY_CLIP))[:]
    texts = tokenizer([f"a photo of a {name}." for name in class_names_of(dataset)], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip(**texts, pixel_values=torch.stack(examples["pixel_values"])).logits_per_image
    predictions = finished.predictions(run, "noto")
    np.testing.assert_array_equal(predictions.predicted, logits.argmax(dim=-1))
    np.testing.assert_allclose(predictions.confidence, logits.softmax(dim=-1).amax(dim=-1), rtol=1e-4)
    assert predictions.class_names == class_names_of(dataset)
    accuracy = np.mean(predictions.predicted == examples["labels"])
    assert finished.metrics(run, "noto")["accuracy"] == pytest.approx(accuracy)


def test_an_ensemble_is_not_the_zero_shot_model(finished):
    zero_shot, ensemble = (
        next(run for run in all_runs() if run.method == name and "noto" in run.tests) for name in METHODS[:2]
    )
    confidence = [finished.predictions(run, "noto").confidence for run in (zero_shot, ensemble)]
    assert not np.allclose(*confidence)


def test_base_and_new_are_the_halves_of_the_classes(finished, styles):
    names = class_names_of(styles["fluenthc"]["test"])
    for run in base_to_new("fluenthc", ["prompt-tuning"], (2,), (1,)):
        base, new = (finished.predictions(run, test) for test in run.tests)
        assert (base.class_names, new.class_names) == (names[:6], names[6:])
        assert len(base.labels) + len(new.labels) == len(styles["fluenthc"]["test"])


def test_a_linear_probe_knows_no_new_classes(finished):
    (run,) = base_to_new("fluenthc", ["linear-probe"], (2,), (1,))
    assert finished.metrics(run, "base")["accuracy"] > 0
    assert finished.metrics(run, "new") is None
    assert not finished.missing_tests(run)


def test_runs_that_train_the_same_are_done_once(finished):
    keys = [tuple(line[key] for key in ("method", "classes", "shots", "seed")) for line in lines_of(finished)]
    # trained: 2 shots of all classes serve the curve and the transfer; untrained: once for each half of the classes
    assert len(keys) == len(set(keys)) == 2 * 2 + 2 * 3


def test_a_second_time_nothing_is_done(finished, styles):
    before = finished.path.read_text()
    again = Results(finished.folder, finished.fingerprint)
    Benchmark(lambda: pytest.fail("the model was loaded"), styles, again).run(all_runs())
    assert finished.path.read_text() == before
    assert all(again.metrics(run, test) == finished.metrics(run, test) for run in all_runs() for test in run.tests)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_line_it_goes_on_with_nothing_lost_or_doubled(finished, open_benchmark, tmp_path):
    lines = finished.path.read_bytes().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/results.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    benchmark = open_benchmark("killed")
    benchmark.run(all_runs())
    resumed, whole = [*map(without_time, lines_of(benchmark.results))], [*map(without_time, lines_of(finished))]
    assert [line | {"tests": None} for line in resumed] == [line | {"tests": None} for line in whole]
    for line, expected in zip(resumed, whole):
        # the images are embedded in other batches, which rounds differently
        assert {name: pytest.approx(metrics, abs=0.01) for name, metrics in expected["tests"].items()} == line["tests"]


def test_a_run_that_fails_leaves_the_model_as_it_was(open_benchmark, backbone, monkeypatch):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    monkeypatch.setattr("transformers.Trainer.train", lambda self: 1 / 0)
    benchmark = open_benchmark()
    with pytest.raises(ZeroDivisionError):
        benchmark.run(few_shot_curve("noto", ["prompt-tuning"], (1,), (1,)))
    torch.testing.assert_close(dict(backbone.model.state_dict()), before)
    assert not benchmark.results.path.exists()


@pytest.mark.slow
def test_lora_changes_both_towers_and_leaves_none_of_it(open_benchmark, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    benchmark = open_benchmark()
    lora, prompts, zero_shot = few_shot_curve("noto", ["clip-lora", "prompt-tuning", "zero-shot"], (1,), (1,))
    benchmark.run([lora, prompts, zero_shot])
    confidence = [benchmark.results.predictions(run, "noto").confidence for run in (lora, prompts, zero_shot)]
    assert not np.allclose(confidence[0], confidence[2]) and not np.allclose(confidence[1], confidence[2])
    torch.testing.assert_close(dict(backbone.model.state_dict()), before)


@pytest.mark.parametrize("method", ["tip-adapter", "clap", pytest.param("2sfs", marks=pytest.mark.slow)])
def test_class_heads_answer_for_new_classes_and_leave_nothing_behind(open_benchmark, backbone, method):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    benchmark = open_benchmark()
    (run,), (zero_shot, *_) = base_to_new("noto", [method], (1,), (1,)), base_to_new("noto", ["zero-shot"], (1,), (1,))
    benchmark.run([run, zero_shot])
    differ = {
        test: not np.allclose(
            *(benchmark.results.predictions(one, test).confidence for one in (run, zero_shot)), rtol=1e-3
        )
        for test in run.tests
    }
    assert differ == {"base": True, "new": method == "2sfs"}  # whose text tower is tuned
    num_trained, num_bytes = benchmark.results.size(run)
    assert num_trained == {"tip-adapter": 0, "clap": 6 * 128, "2sfs": 4096 + 6 * 128}[method] and num_bytes > 0
    torch.testing.assert_close(dict(backbone.model.state_dict()), before)


def test_the_size_is_that_of_the_saved_adapter(open_benchmark, backbone, tmp_path):
    benchmark = open_benchmark()
    runs = few_shot_curve("noto", ["zero-shot", "linear-probe", "clip-lora", "coop"], (1,), (1,))
    benchmark.run(runs)
    zero_shot, probe, lora, coop = (benchmark.results.size(run) for run in runs)
    assert zero_shot == (0, 0) and probe == (12 * (backbone.model.config.projection_dim + 1), 0)
    backbone.model.set_class_names(["cat", "dog"])
    for name, size in zip(("clip-lora", "coop"), (lora, coop)):
        model = get_peft_model(backbone.model, method_config(name, backbone.model))
        model.save_pretrained(tmp_path / "adapter")
        num_bytes = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
        assert size == (model.get_nb_trainable_parameters()[0], num_bytes)
        model.unload()


def test_other_settings_are_not_mixed_in(finished, styles):
    other = TrainingSettings(num_train_epochs=2, when_fewer="all", ensemble="imagenet_simple")
    results = Results(finished.folder, other.fingerprint("tiny"))
    assert all(results.missing_tests(run) == run.tests for run in all_runs())
    assert SETTINGS.fingerprint("tiny") != SETTINGS.fingerprint("large")


def test_what_is_not_there_is_told_before_any_work(open_benchmark):
    benchmark = open_benchmark(load_backbone=lambda: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"no data set 'pets' with a split 'train'.*fluenthc \(train\)"):
        benchmark.run(few_shot_curve("pets", ["zero-shot"]))
    with pytest.raises(ValueError, match="no data set 'cars' with a split 'test'"):
        benchmark.run(transfer("noto", ["cars"], ["zero-shot"]))
    with pytest.raises(ValueError, match="no method 'magic'.*zero-shot, ensemble"):
        few_shot_curve("noto", ["magic"])


def test_a_draw_is_that_of_sample_few_shot_and_base_classes_are_kept_after_it(styles):
    train = styles["noto"]["train"]
    pool = ImagePool(train)
    names = train.features["label"].names
    drawn = sample_few_shot(train, 3, seed=2)
    few = pool.few_shot(3, seed=2)
    assert few.labels == drawn["label"][:]
    assert [train[row]["image"].tobytes() for row in few.rows] == [image.tobytes() for image in drawn["image"]]
    base = pool.few_shot(3, seed=2, label_names=names[:6])
    assert base.rows == [row for row, label in zip(few.rows, few.labels) if label < 6]


@torch.no_grad()
def test_embeddings_are_those_of_the_images_whatever_was_asked_for_before(styles, backbone):
    pool = ImagePool(styles["noto"]["test"])
    pool.classes(["clock", "food"]).embeds(backbone.model, backbone.image_processor)
    images = pool.classes(["heart", "food"])
    pixels = images.pixels(backbone.image_processor)[:]
    expected = backbone.model.get_image_features(torch.stack(pixels["pixel_values"])).pooler_output
    embedded = images.embedded(backbone.model, backbone.image_processor)[:]
    torch.testing.assert_close(embedded["image_embeds"], expected, rtol=1e-4, atol=1e-4)
    assert embedded["labels"].tolist() == pixels["labels"] == images.labels


@pytest.mark.slow
def test_published_methods_are_run_by_name_with_what_they_need(open_benchmark, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    benchmark = open_benchmark()
    names = ["coop-csc", "vpt-shallow", "prograd", "cocoop"]  # per class, in images, own Trainer, for each image
    runs = base_to_new("noto", names, (1,), (1,))
    benchmark.run(runs)
    assert {run.method for run in runs if benchmark.results.metrics(run, "new") is None} == {"coop-csc"}
    assert all(benchmark.results.metrics(run, "base")["accuracy"] > 0 for run in runs)
    torch.testing.assert_close(dict(backbone.model.state_dict()), before)


def test_published_methods_can_be_trained_as_their_papers_do(styles, backbone, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("clip_prompt_peft.training.recipes.Trainer.train", lambda self: seen.append(self))
    settings = TrainingSettings(num_train_epochs=7, when_fewer="all", paper_recipes=True)
    paper = Backbone(backbone.model, backbone.image_processor, settings)
    benchmark = Benchmark(lambda: paper, styles, Results(tmp_path, settings.fingerprint("tiny")))
    benchmark.run(few_shot_curve("noto", ["kgcoop", "clip-lora", "prompt-tuning"], (2,), (1,)))
    kgcoop, lora, own = seen
    assert (kgcoop.args.num_train_epochs, kgcoop.args.max_grad_norm) == (100, 0)
    assert isinstance(kgcoop.optimizer, torch.optim.SGD)
    assert (lora.args.max_steps, lora.args.learning_rate, lora.args.weight_decay) == (1000, 2e-4, 1e-2)
    assert (own.args.num_train_epochs, own.optimizer) == (7, None)
