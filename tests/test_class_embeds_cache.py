"""While evaluating, class embeddings are computed once, and are never those of an earlier state."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from datasets import Dataset
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.class_encoder import ClassEncoder


CACHE = "clip_prompt_peft.class_encoder.cache"
LORA = {
    "r": 2,
    "target_modules": r"text_model.*(q_proj|fc1)",
    "init_lora_weights": False,
}  # changes the outputs at once


@pytest.fixture(autouse=True, scope="module")
def sizes_as_in_a_real_model():
    """The embedded model is so small that all of its weights would be compared whole: now the position table is, and
    the matrices are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{CACHE}.SMALL", 10_000)
        yield


def new_classifier():
    return CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES).eval()


def prompt_config():
    return CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="RANDOM")


@pytest.fixture
def prompted(classifier):
    """With two adapters, "default" being active."""
    model = get_peft_model(classifier, prompt_config())
    model.add_adapter("other", prompt_config())
    return model.eval()


@torch.no_grad()
def evaluate(model):
    """Class embeddings as an evaluation uses them."""
    return base_of(model).get_class_embeds()


@torch.no_grad()
def compute_anew(model):
    classifier = base_of(model)
    return ClassEncoder(path="plain")(classifier, classifier._class_prompts(), classifier.prompt_layout)


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vectors_of(model, name="default"):
    return base_of(model).text_model.embeddings.learnable_embeddings[name]


def assert_up_to_date(model):
    torch.testing.assert_close(evaluate(model), compute_anew(model), rtol=0, atol=1e-5)


def assert_kept(model, runs):
    """The text tower does not run, and the embeddings are right."""
    before = runs.count
    embeds = evaluate(model)
    assert runs.count == before
    torch.testing.assert_close(embeds, compute_anew(model), rtol=0, atol=1e-5)


def values_compared(model):
    """About as many as are held with one result: the adapters and the small tensors of the text side."""
    return sum(p.numel() for p in base_of(model).text_model.parameters() if p.requires_grad or p.numel() <= 10_000)


class CountedRuns:
    """How often the text tower runs within a `with`."""

    def __init__(self, model):
        self.layer, self.count = base_of(model).text_model.encoder.layers[0], 0

    def __enter__(self):
        self.hook = self.layer.register_forward_hook(self.counted)
        return self

    def counted(self, *args):
        self.count += 1

    def __exit__(self, *error):
        self.hook.remove()


def train_steps(model, **optimizer_arguments):
    """Two steps on random images, as a Trainer would make them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **optimizer_arguments)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=torch.randn(4, 3, 48, 48), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    model.eval()


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


def switch_off_and_on(model):
    with model.disable_adapter():
        assert_up_to_date(model)


def load_lora_merge_and_unload(model):
    """A zero-shot classifier gets other weights without a trace in its modules."""
    return get_peft_model(model.unload(), LoraConfig(**LORA)).merge_and_unload()


def merge_prompt_and_unload(model):
    """The same for the position embeddings, with the same texts before and after."""
    zero_shot = model.unload()
    assert_up_to_date(zero_shot)
    return get_peft_model(zero_shot, prompt_config()).merge_and_unload()


def merge_token_and_unload(model):
    zero_shot = model.unload()
    assert_up_to_date(zero_shot)
    token = zero_shot.tokenizer("photo", add_special_tokens=False)["input_ids"]
    tuned = get_peft_model(zero_shot, TrainableTokensConfig(target_modules=["token_embedding"], token_indices=token))
    next(p for p in tuned.parameters() if p.requires_grad).data.add_(0.5)
    return tuned.merge_and_unload()


def merge_other_vectors_again(model):
    model.merge_adapter()
    assert_up_to_date(model)
    model.unmerge_adapter()
    vectors_of(model).data.add_(0.1)
    model.merge_adapter()


def load_other_weights(model):
    state = {name: value + 0.1 for name, value in model.state_dict().items() if "learnable" in name}
    model.load_state_dict(state, strict=False)


def assign_other_weights(model):
    state = {name: value + 0.1 for name, value in model.state_dict().items() if "learnable" in name}
    model.load_state_dict(state, strict=False, assign=True)


def train_frozen_projection(model):
    """Unfrozen, trained by an optimizer that leaves versions alone, frozen again."""
    projection = base_of(model).text_projection.requires_grad_(True)
    train_steps(model, fused=True)
    projection.requires_grad_(False)


def edit_one_value_of_a_matrix(model):
    with torch.no_grad():
        base_of(model).text_projection.weight[3, 1] += 1


def exchange_the_data_of_a_matrix(model):
    weight = base_of(model).text_projection.weight
    changed = weight.detach().clone()
    changed[3, 1] += 1
    weight.data = changed


def exchange_an_activation(model):
    base_of(model).text_model.encoder.layers[0].mlp.activation_fn = torch.nn.ReLU()


def edit_one_value_of_the_vectors(model):
    vectors_of(model).data[2, 5] += 1


def edit_one_value_of_a_large_adapter(model):
    model = get_peft_model(model.unload(), LoraConfig(**{**LORA, "r": 100})).eval().requires_grad_(False)
    evaluate(model)
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 3] += 10
    return model


def edit_one_value_of_a_trained_matrix(model):
    weight = base_of(model).text_projection.requires_grad_(True).weight
    evaluate(model)
    weight.data[3, 1] += 1


def rescale_lora(model):
    model = get_peft_model(model.unload(), LoraConfig(**LORA)).eval()
    assert_up_to_date(model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    return model


def add_module_to_save(model):
    config = CLIPPromptTuningConfig(modules_to_save=["text_projection"])
    model = get_peft_model(model.unload(), config).eval()
    assert_up_to_date(model)
    base_of(model).text_projection.modules_to_save["default"].weight.data.neg_()
    return model


OPERATIONS = {
    "optimizer_step": train_steps,
    "fused_optimizer_step": lambda model: train_steps(model, fused=True),
    "frozen_weight_trained_meanwhile": train_frozen_projection,
    "in_place_edit": lambda model: vectors_of(model).requires_grad_(False).add_(0.1),
    "data_edit": lambda model: vectors_of(model).data.add_(0.1),
    "data_edit_of_one_value": edit_one_value_of_the_vectors,
    "data_edit_of_a_large_adapter": edit_one_value_of_a_large_adapter,
    "data_edit_of_a_trained_matrix": edit_one_value_of_a_trained_matrix,
    "new_data": lambda model: setattr(vectors_of(model), "data", torch.zeros_like(vectors_of(model))),
    "load": load_other_weights,
    "load_by_assignment": assign_other_weights,
    "set_adapter": lambda model: model.set_adapter("other"),
    "delete_adapter": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "merge_other_vectors_again": merge_other_vectors_again,
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "load_lora_merge_and_unload": load_lora_merge_and_unload,
    "merge_prompt_and_unload": merge_prompt_and_unload,
    "merge_token_and_unload": merge_token_and_unload,
    "rescale_lora": rescale_lora,
    "module_to_save": add_module_to_save,
    "set_class_names": lambda model: base_of(model).set_class_names(["clock", "heart", "arrow", "hand"]),
    "frozen_weight_edit": lambda model: base_of(model).text_projection.weight.data.neg_(),
    "edit_of_one_frozen_value": edit_one_value_of_a_matrix,
    "new_frozen_data": exchange_the_data_of_a_matrix,
    "new_activation": exchange_an_activation,
    "to_bfloat16": lambda model: model.to(torch.bfloat16),
    "to_bfloat16_and_back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "autocast": None,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_leaves_old_embeddings(prompted, operation):
    before = evaluate(prompted)
    if operation == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(evaluate(prompted), before)
    else:
        model = OPERATIONS[operation](prompted)
        model = model if isinstance(model, torch.nn.Module) else prompted
        after = evaluate(model.eval())
        assert not torch.equal(after, before)
        expected = compute_anew(model)
        torch.testing.assert_close(after, expected, rtol=0, atol=0.02 if "bfloat16" in operation else 1e-5)


@pytest.mark.parametrize("operation", [switch_off_and_on, lambda model: model.merge_adapter()])
def test_what_changes_nothing_in_the_end_gives_what_was_there(prompted, operation):
    before = evaluate(prompted)
    operation(prompted)
    torch.testing.assert_close(evaluate(prompted), before, rtol=0, atol=1e-5)


def test_a_template_for_zero_shot_is_taken_up(classifier):
    before = evaluate(classifier)
    classifier.set_prompt_template("an icon of a {}.")
    assert not torch.equal(evaluate(classifier), before)
    assert_up_to_date(classifier)


class NeverStale(RuleBasedStateMachine):
    """Any sequence of public operations, evaluated at any points in between."""

    @initialize()
    def start(self):
        torch.manual_seed(0)
        self.model = get_peft_model(new_classifier(), prompt_config()).eval()
        self.classifier = self.model.get_base_model()

    @property
    def is_prompted(self):
        return (
            self.model is not self.classifier and "prompt" in str(self.model.peft_config[self.first].peft_type).lower()
        )

    @property
    def first(self):
        return next(iter(self.model.peft_config))

    @property
    def has_adapter(self):
        return self.model is not self.classifier

    @property
    def is_merged(self):
        return self.has_adapter and any(getattr(module, "merged_adapters", None) for module in self.model.modules())

    @rule()
    def evaluate(self):
        assert_up_to_date(self.model)

    @rule(fused=st.booleans())
    @precondition(lambda self: self.has_adapter and not self.is_merged)
    def train(self, fused):
        train_steps(self.model, fused=fused)

    @rule(through_data=st.booleans(), by=st.sampled_from([-0.2, 0.1]))
    @precondition(lambda self: self.has_adapter)
    def edit_adapter(self, through_data, by):
        for name, parameter in self.model.named_parameters():
            if "learnable_" in name or "lora_" in name:
                with torch.no_grad():
                    (parameter.data if through_data else parameter).add_(by)

    @rule()
    def edit_projection(self):
        with torch.no_grad():
            next(self.classifier.text_projection.parameters()).mul_(-1)

    @rule(name=st.sampled_from(["default", "second"]))
    @precondition(lambda self: self.is_prompted and not self.is_merged)
    def add_or_set_adapter(self, name):
        if name not in self.model.peft_config:
            self.model.add_adapter(name, prompt_config())
        self.model.set_adapter(name)

    @rule()
    @precondition(lambda self: self.has_adapter and len(self.model.peft_config) > 1 and not self.is_merged)
    def delete_adapter(self):
        inactive = next(name for name in self.model.peft_config if name not in self.model.active_adapters)
        self.model.delete_adapter(inactive)

    @rule()
    @precondition(lambda self: self.has_adapter)
    def disable_and_enable(self):
        with self.model.disable_adapter():
            assert_up_to_date(self.model)

    @rule()
    @precondition(lambda self: self.has_adapter)
    def merge_or_unmerge(self):
        self.model.unmerge_adapter() if self.is_merged else self.model.merge_adapter()

    @rule(merge=st.booleans())
    @precondition(lambda self: self.has_adapter)
    def unload(self, merge):
        merge = merge and not self.is_merged
        self.model = (self.model.merge_and_unload() if merge else self.model.unload()).eval()

    @rule(kind=st.sampled_from(["prompt", "lora"]))
    @precondition(lambda self: not self.has_adapter)
    def inject(self, kind):
        self.model = get_peft_model(self.classifier, LoraConfig(**LORA) if kind == "lora" else prompt_config()).eval()

    @rule(names=st.sampled_from([CLASS_NAMES, CLASS_NAMES[::-1], ["red car", "cat", "old wooden house"]]))
    def set_class_names(self, names):
        self.classifier.set_class_names(names)

    @rule(template=st.sampled_from(["a photo of a {}.", "{}", "an icon of a {}."]))
    def set_prompt_template(self, template):
        self.classifier.set_prompt_template(template)

    @rule()
    def change_precision_and_back(self):
        self.model.to(torch.bfloat16).to(torch.float32)

    @rule()
    def load(self):
        state = {name: value * 0.9 for name, value in self.model.state_dict().items() if value.is_floating_point()}
        self.model.load_state_dict(state, strict=False)

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.classifier = base_of(self.model)

    def teardown(self):
        if hasattr(self, "model"):
            assert_up_to_date(self.model)


TestNeverStale = NeverStale.TestCase
TestNeverStale.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
