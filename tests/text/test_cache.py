"""Class embeddings that are kept are never those of an earlier state."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from adapters import base_of, vectors_of
from cases import new_classifier
from class_embeds import (
    LORA,
    assert_up_to_date,
    compute_anew,
    evaluate,
    prompt_config,
    prompted_classifier,
    train_steps,
)
from conftest import CLASS_NAMES
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


pytestmark = pytest.mark.usefixtures("sizes_as_in_a_real_model")


@pytest.fixture
def prompted():
    return prompted_classifier()


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


TestNeverStale = pytest.mark.slow(NeverStale.TestCase)
TestNeverStale.settings = settings(suppress_health_check=list(HealthCheck))
