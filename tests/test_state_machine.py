"""Any sequence of public operations leaves a model that a newly built one in the same state equals.

`HYPOTHESIS_PROFILE=nightly pytest tests/test_state_machine.py -s` takes thousands of steps and says how many of which.
"""

import copy
import io
import pickle
import tempfile
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from adapters import base_of
from conftest import CLASS_NAMES
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_state import (
    KINDS,
    MERGEABLE,
    POSITIONS,
    Adapter,
    State,
    frozen_tensors,
    own_tensors,
    parameters_of,
)
from peft import PeftModel, get_peft_model


CACHE = "clip_prompt_peft.text.cache"
NAMES = ["first", "second", "third"]
CLASSES = [CLASS_NAMES, CLASS_NAMES[::-1], ["red car", "cat", "old wooden house"], ["clock"]]
TEMPLATES = ["a photo of a {}.", "{}", "a {}, seen from above."]
EQUAL = {"rtol": 1e-5, "atol": 1e-5}
MERGED = {"rtol": 0, "atol": 1e-4}  # merging changes the order of two additions
PIXELS = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
IS_LONG_RUN = settings().max_examples > 100


@torch.no_grad()
def logits_of(model):
    model = model if getattr(model, "peft_config", None) else base_of(model)  # peft wants an adapter to run
    return model(pixel_values=PIXELS.to(base_of(model).dtype)).logits


class AnyOrder(RuleBasedStateMachine):
    """A model, and what its state must be by now."""

    steps: Counter = Counter()

    def count(self, what):
        AnyOrder.steps[what] += 1

    @initialize(
        kind=st.sampled_from([*sorted(KINDS), *3 * sorted(MERGEABLE)]),  # most operations can follow these
        has_lora=st.sampled_from([False, False, True]),
        may_compile=st.sampled_from([False] * 5 + [IS_LONG_RUN]),  # which takes seconds
    )
    def start(self, kind, has_lora, may_compile):
        self.may_compile = may_compile
        torch.manual_seed(0)
        self.state = State(CLASS_NAMES, has_lora=has_lora)
        self.model = self.state.base()
        self.add_adapter(kind)

    # What must hold after each step

    @invariant()
    def outputs_are_those_of_a_new_model(self):
        expected = logits_of(self.state.build())
        torch.testing.assert_close(logits_of(self.model), expected, **EQUAL)
        assert base_of(self.model).class_names == self.state.classes_in_use

    @invariant()
    def frozen_tensors_are_the_checkpoints(self):
        frozen = frozen_tensors(base_of(self.model))
        assert frozen.keys() == self.state.frozen.keys()
        if self.state.is_merged:
            frozen[POSITIONS][self.state.in_effect.positions] = self.state.frozen[POSITIONS][
                self.state.in_effect.positions
            ]
        assert [name for name, value in frozen.items() if not torch.equal(value, self.state.frozen[name])] == []

    @invariant()
    def tensors_of_adapters_are_as_they_were_left(self):
        own = own_tensors(base_of(self.model))
        assert not (diff := sorted(own.keys() ^ self.state.own.keys())), diff
        assert [name for name, value in own.items() if not torch.equal(value, self.state.own[name])] == []

    @invariant()
    def what_is_trained_is_what_should_be(self):
        trained = {name for name, value in parameters_of(base_of(self.model)).items() if value.requires_grad}
        assert not (diff := sorted(trained ^ self.state.trained)), diff

    # Training and evaluating

    @property
    def pixel_values(self):
        return PIXELS.to(base_of(self.model).dtype)

    @property
    def is_trainable(self):
        return bool(self.state.trained) and not self.state.is_merged and not self.state.is_disabled

    @rule(fused=st.booleans())
    @precondition(lambda self: self.is_trainable)
    def train(self, fused):
        self.count("train")
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.01, fused=fused)
        labels = torch.randint(len(self.state.classes_in_use), (len(PIXELS),))
        self.model.train()
        base_of(self.model)(pixel_values=self.pixel_values, labels=labels, return_loss_terms=True).loss.backward()
        optimizer.step()
        self.model.eval().zero_grad()
        own = own_tensors(base_of(self.model))
        is_changed = any(not torch.equal(value, self.state.own[name]) for name, value in own.items())
        assert is_changed or len(self.state.classes_in_use) == 1  # which leaves nothing to learn
        self.state.own |= {name: own[name] for name in self.state.trained}

    @rule(through_data=st.booleans())
    @precondition(lambda self: not self.state.is_merged)
    def edit_own_tensors(self, through_data):
        self.count("edit own tensors")
        with torch.no_grad():
            for name, parameter in parameters_of(base_of(self.model)).items():
                if name in self.state.own:
                    (parameter.data if through_data else parameter).mul_(0.9)
                    self.state.own[name] = parameter.detach().clone()

    @rule(by=st.sampled_from([-1, 1.01]))
    def edit_frozen_tensor(self, by):
        self.count("edit frozen tensor")
        with torch.no_grad():
            base_of(self.model).visual_projection.weight.mul_(by)
            self.state.frozen["visual_projection.weight"].mul_(by)

    @rule(number=st.integers(0, 10**6), is_training=st.booleans())
    def fail_in_the_middle_of_a_forward(self, number, is_training):
        modules = [module for module in base_of(self.model).modules() if not list(module.children())]

        def fail(*_):
            raise MemoryError("as if")

        handle = modules[number % len(modules)].register_forward_hook(fail)
        self.model.train(is_training)
        try:
            base_of(self.model)(pixel_values=self.pixel_values, labels=torch.zeros(3).long(), return_loss_terms=True)
        except MemoryError:
            self.count("fail in a forward")
        finally:
            handle.remove()
            self.model.eval()

    @rule(names=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=3, max_size=3))
    @precondition(lambda self: self.state.adapters and not self.state.is_merged)
    def mixed_batch(self, names):
        self.count("mixed batch")
        names = [name if name in self.state.adapters else "__base__" for name in names]
        with torch.no_grad():
            mixed = self.model(pixel_values=self.pixel_values, adapter_names=names).logits
        alone = copy.copy(self.state)
        for row, name in enumerate(names):
            alone.active = None if name == "__base__" else name
            if alone.active is not None or self.state.is_disabled:
                torch.testing.assert_close(mixed[row], logits_of(alone.build())[row], **EQUAL)

    @rule()
    @precondition(lambda self: self.may_compile)
    def compiled_call(self):
        self.count("compiled call")
        self.may_compile = False
        torch._dynamo.reset()
        expected = logits_of(self.model)  # prompts are built before compiling
        compiled = torch.compile(self.model, backend="eager")
        torch.testing.assert_close(logits_of(compiled), expected, **EQUAL)

    # Adapters

    @rule(kind=st.sampled_from(sorted(KINDS)))
    @precondition(lambda self: len(self.state.adapters) < len(NAMES))
    def add_adapter(self, kind):
        self.count("add adapter")
        name = next(name for name in NAMES if name not in self.state.adapters)
        adapter = Adapter(kind, self.state.prompt_template, self.state.class_names)
        config = adapter.config()
        if self.model is base_of(self.model):
            self.model = get_peft_model(self.model, config, adapter_name=name).eval()
            self.state.active = name
        else:
            self.model.add_adapter(name, config)
            if not self.state.adapters:
                self.model.set_adapter(name)
                self.state.active = name
            self.model.eval()
        self.state.adapters[name] = adapter
        adapter.is_trained = name == self.state.active
        self.state.is_merged = False  # peft unmerges whenever it sets the active adapter, here to what it was
        self.state.own |= {
            key: value for key, value in own_tensors(base_of(self.model)).items() if key not in self.state.own
        }

    def activated(self, name):
        """peft unmerges, and makes the adapter trainable."""
        self.state.active, self.state.is_merged = name, False
        for other, adapter in self.state.adapters.items():
            adapter.is_trained = other == name

    @rule(data=st.data())
    @precondition(lambda self: self.state.adapters)
    def set_adapter(self, data):
        self.count("set adapter")
        name = data.draw(st.sampled_from(sorted(self.state.adapters)))
        self.model.set_adapter(name)
        self.activated(name)

    @rule(data=st.data())
    @precondition(lambda self: len(self.state.adapters) > (self.state.is_disabled or self.state.has_lora))
    def delete_adapter(self, data):
        self.count("delete adapter")
        name = data.draw(st.sampled_from(sorted(self.state.adapters)))
        if len(self.state.adapters) == 1 and self.state.adapters[name].kind == "projection":
            return  # peft adds no adapter afterwards: its modules_to_save wrapper refuses to have none active
        if self.state.is_merged and name == self.state.active:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.state.adapters[name]
        self.state.own = {key: value for key, value in self.state.own.items() if name not in key.split(".")}
        if name == self.state.active:
            self.activated(min(self.state.adapters, default=None))

    @rule(enable=st.booleans())
    @precondition(lambda self: self.state.adapters)
    def disable_or_enable(self, enable):
        self.count("enable" if enable else "disable")
        if enable:
            self.model.base_model.enable_adapter_layers()
            for name, adapter in self.state.adapters.items():
                adapter.is_trained = name == self.state.active
        else:
            self.model.base_model.disable_adapter_layers()
            logits_of(self.model)  # unmerges
            self.state.is_merged = False
            for adapter in self.state.adapters.values():
                adapter.is_trained = False
        self.state.is_lora_trained = enable
        self.state.is_disabled = not enable

    @rule()
    @precondition(lambda self: self.may_merge and self.state.in_effect.kind in MERGEABLE)
    def merge(self):
        self.count("merge")
        expected = logits_of(self.model)
        self.model.merge_adapter()
        self.state.is_merged = True
        torch.testing.assert_close(logits_of(self.model), expected, **self.merged)

    @rule()
    @precondition(lambda self: self.may_merge and self.state.in_effect.kind not in MERGEABLE)
    def be_refused_a_merge(self):
        self.count("refused merge")
        with pytest.raises(ValueError, match="cannot be merged"):
            self.model.merge_adapter()

    @rule()
    @precondition(lambda self: self.state.is_merged and not self.state.is_disabled)
    def unmerge(self):
        self.count("unmerge")
        self.model.unmerge_adapter()
        self.state.is_merged = False

    @property
    def may_merge(self):
        return self.state.in_effect and not self.state.has_lora and not self.state.is_merged

    @property
    def merged(self):
        is_half = base_of(self.model).dtype is torch.bfloat16
        return {"rtol": 0.1, "atol": 1.0} if is_half else MERGED

    @rule()
    @precondition(lambda self: self.state.adapters)
    def unload(self):
        self.count("unload")
        self.model = self.model.unload().eval()
        self.state = State(self.state.class_names, self.state.prompt_template, frozen=self.state.frozen)

    @rule()
    @precondition(lambda self: self.state.in_effect and self.state.in_effect.kind in ("context", "long"))
    def merge_and_unload_a_copy(self):
        self.count("merge and unload")
        expected = logits_of(self.model)
        merged = copy.deepcopy(self.model).merge_and_unload()
        torch.testing.assert_close(logits_of(merged), expected, **self.merged)
        assert merged.class_names == self.state.classes_in_use

    # Classes, texts, precision

    @rule(names=st.sampled_from(CLASSES))
    def set_class_names(self, names):
        self.count("set class names")
        adapter = self.state.in_effect
        if adapter and adapter.kind == "class_specific" and names != adapter.class_names:
            with pytest.raises(ValueError, match="has vectors of their own for each of its"):
                base_of(self.model).set_class_names(names)
            return
        base_of(self.model).set_class_names(names)
        self.state.class_names = names
        if adapter:
            adapter.class_names = names

    @rule(template=st.sampled_from(TEMPLATES))
    def set_prompt_template(self, template):
        self.count("set prompt template")
        base_of(self.model).set_prompt_template(template)
        self.state.prompt_template = template

    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    @precondition(lambda self: not self.state.is_merged)
    def move(self, dtype):
        self.count("change precision")
        self.model.to(dtype)
        for tensors in (self.state.frozen, self.state.own):
            for name, value in tensors.items():
                tensors[name] = value.to(dtype) if value.is_floating_point() else value

    # Copies and files

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, how):
        self.count(how)
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)

    @rule(low_cpu_mem_usage=st.booleans())
    @precondition(lambda self: self.state.adapters and not self.state.has_lora)
    def save_and_load(self, low_cpu_mem_usage):
        self.count("save and load")
        names = list(self.state.adapters)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
            self.model = PeftModel.from_pretrained(
                self.state.base(), f"{folder}/{names[0]}", adapter_name=names[0], **options
            )
            options["is_trainable"] = False  # set_adapter leaves the requires_grad of inactive modules_to_save alone
            for name in names[1:]:
                self.model.load_adapter(f"{folder}/{name}", name, **options)
        self.model.eval()
        own = own_tensors(base_of(self.model))
        for name, value in own.items():  # in float32 at least
            assert torch.equal(value, self.state.own[name].to(value.dtype))
        self.state.own, self.state.is_disabled = own, False
        if self.state.active is not None:
            self.model.set_adapter(self.state.active)
        self.activated(self.state.active)

    @rule()
    def load_state_dict(self):
        self.count("load state dict")
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_sequence_of_operations_gives_what_a_new_model_gives(sizes_as_in_a_real_model):
    AnyOrder.steps.clear()
    run_state_machine_as_test(AnyOrder, settings=settings(suppress_health_check=list(HealthCheck), deadline=None))
    print(f"\n{AnyOrder.steps.total()} steps: {dict(AnyOrder.steps.most_common())}")
    assert len(AnyOrder.steps) >= 10  # kinds of operations
