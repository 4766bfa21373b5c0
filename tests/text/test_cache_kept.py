"""While evaluating, class embeddings are computed once."""

import copy

import pytest
import torch
from adapters import base_of, vectors_of
from class_embeds import (
    CACHE,
    LORA,
    CountedRuns,
    assert_kept,
    assert_up_to_date,
    evaluate,
    prompted_classifier,
    values_compared,
)
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments


pytestmark = pytest.mark.usefixtures("sizes_as_in_a_real_model")


@pytest.fixture
def prompted():
    return prompted_classifier()


class TestKept:
    def test_an_evaluation_of_many_batches_encodes_the_classes_once(self, prompted, tmp_path):
        dataset = Dataset.from_dict(
            {"pixel_values": torch.randn(10, 3, 48, 48).numpy(), "labels": [0, 1, 2, 3, 0] * 2}
        )
        args = TrainingArguments(tmp_path, per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True)
        trainer = Trainer(prompted, args, eval_dataset=dataset.with_format("torch"))
        evaluate(prompted)  # has asked the tower which path is exact
        vectors_of(prompted).data.add_(0.1)
        with CountedRuns(prompted) as runs:
            trainer.evaluate()
        assert runs.count == 1

    def test_adapters_that_are_switched_back_and_forth_are_encoded_once_each(self, prompted):
        with CountedRuns(prompted) as runs:
            for name in ("default", "other"):
                prompted.set_adapter(name)
                evaluate(prompted)
            first_round = runs.count
            for name in ("default", "other") * 2:
                prompted.set_adapter(name)
                assert_kept(prompted, runs)
        assert first_round > 0

    def test_class_lists_that_are_switched_back_and_forth_are_encoded_once_each(self, prompted):
        lists = [["cat", "dog"], ["red car", "blue car", "bus"]]
        for class_names in lists:
            base_of(prompted).set_class_names(class_names)
            evaluate(prompted)
        with CountedRuns(prompted) as runs:
            for class_names in lists:
                base_of(prompted).set_class_names(class_names)
                assert_kept(prompted, runs)

    def test_a_second_look_at_changed_vectors_does_not_ask_again_which_path_is_exact(self, prompted):
        evaluate(prompted)
        base_of(prompted).set_class_names(["cat", "dog"])
        with CountedRuns(prompted) as runs:
            evaluate(prompted)
        assert runs.count == 1

    def test_where_there_is_no_room_for_all_results_the_oldest_goes(self, prompted, monkeypatch):
        lists = [[f"cat {number}", "dog"] for number in range(30)]

        def evaluate_with(class_names):
            base_of(prompted).set_class_names(class_names)
            evaluate(prompted)

        evaluate_with(lists[0])
        monkeypatch.setattr(f"{CACHE}.MAX_COMPARED", 10 * values_compared(prompted))
        for class_names in lists[1:]:
            evaluate_with(class_names)
        with CountedRuns(prompted) as runs:
            evaluate_with(lists[-2])
            assert runs.count == 0
            evaluate_with(lists[0])
            assert runs.count == 1

    def test_serving_zero_shot_and_with_lora_encodes_once_too(self, classifier, pixel_values):
        for model in (classifier, get_peft_model(classifier, LoraConfig(**LORA)).eval()):
            with torch.no_grad():
                model(pixel_values=pixel_values)
                with CountedRuns(model) as runs:
                    model(pixel_values=pixel_values)
            assert runs.count == 0

    def test_frozen_embeddings_are_kept_where_gradients_are_recorded(self, classifier, pixel_values):
        classifier.requires_grad_(False)
        classifier(pixel_values=pixel_values)
        with CountedRuns(classifier) as runs:
            classifier(pixel_values=pixel_values)
        assert runs.count == 0

    def test_nothing_is_kept_while_training(self, prompted, pixel_values, labels):
        prompted.train()
        evaluate(prompted)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, CountedRuns(prompted) as runs:
                prompted(pixel_values=pixel_values, labels=labels)
            assert runs.count == 1

    def test_embeddings_that_are_differentiated_are_not_taken_from_what_is_kept(self, prompted):
        evaluate(prompted)
        base_of(prompted).get_class_embeds().sum().backward()
        assert vectors_of(prompted).grad is not None

    def test_embeddings_from_inference_mode_serve_for_gradients_later(self, classifier, pixel_values):
        classifier.requires_grad_(False)
        with torch.inference_mode():
            classifier(pixel_values=pixel_values)
        image_embeds = torch.randn(2, classifier.config.projection_dim, requires_grad=True)
        classifier(image_embeds=image_embeds).logits.sum().backward()
        assert image_embeds.grad is not None

    def test_changing_what_get_class_embeds_gave_changes_nothing_else(self, prompted):
        evaluate(prompted).zero_()
        assert_up_to_date(prompted)

    def test_copies_keep_their_own(self, prompted):
        evaluate(prompted)
        other = copy.deepcopy(prompted)
        vectors_of(other).data.zero_()
        assert_up_to_date(other)
        assert_up_to_date(prompted)

    def test_a_model_that_is_trained_as_a_whole_is_not_stored_twice(self, classifier, monkeypatch):
        monkeypatch.setattr(f"{CACHE}.MAX_COMPARED", 1000)
        evaluate(classifier)
        with CountedRuns(classifier) as runs:
            evaluate(classifier)
        assert runs.count == 1

    def test_embeddings_with_dropout_are_not_kept(self, classifier):
        model = get_peft_model(classifier, LoraConfig(**LORA, lora_dropout=0.5)).eval()
        classifier.text_model.train()
        assert not torch.equal(evaluate(model), evaluate(model))

    def test_kept_embeddings_can_be_dropped(self, classifier):
        evaluate(classifier)
        classifier.class_encoder.clear()
        with CountedRuns(classifier) as runs:
            evaluate(classifier)
        assert runs.count == 1
