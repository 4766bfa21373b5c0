"""When class embeddings come from a captured graph, and what is said where they do not."""

import contextlib
import functools
import logging
import re
import types
from dataclasses import fields

import pytest
import torch
from adapters import as_if_trained, base_of, prompted
from cases import new_classifier
from conftest import needs_compile
from graph_engines import (
    StandIn,
    assert_as_eager,
    assert_same_results,
    batch_for,
    captured_of,
    eager_twin,
    engine_of,
    graphed,
    step,
)
from peft import LoraConfig, get_peft_model
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.modeling_clip import CLIPMLP

from clip_prompt_peft.text import ClassEncoder
from clip_prompt_peft.text.graph import CudaEngine
from clip_prompt_peft.text.graph_state import Facts, TowerState, obstacle_to_capture
from clip_prompt_peft.towers import text_side


NAMES = ["cat", "golden retriever", "lily of the valley"]
LOGGER = "clip_prompt_peft.text.graph"


def new_model(cuda_graph="auto", **settings):
    return graphed(as_if_trained(prompted(new_classifier(NAMES), **settings)), cuda_graph=cuda_graph)


@pytest.fixture
def model():
    return new_model()


class TestDecision:
    def test_nothing_speaks_against_the_defaults(self):
        assert obstacle_to_capture(Facts()) is None

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            ({"device_type": "cpu"}, "device of type 'cpu'"),
            ({"num_devices": 2}, "several devices"),
            ({"is_transformed": True}, "torch.func"),
            ({"is_watched": True}, "anomaly detection"),
            ({"is_capturing": True}, "another capture"),
            ({"num_trained": 0}, "nothing in the text tower is trained"),
            ({"has_hooks": True}, "hooks"),
            ({"has_checkpointing": True}, "gradient checkpointing"),
            ({"has_dropout": True}, "dropout"),
            ({"unknown_module": "some.Linear"}, "module of the class some.Linear"),
            ({"unknown_tensor": "Int8"}, "weight of the class Int8"),
            ({"is_for_each_image": True}, "every image"),
            ({"is_shared": True}, "processes share"),
            ({"num_chunks": 3}, "in 3 chunks"),
            ({"needed_bytes": 600 * 2**20, "free_bytes": 2**30}, "keep 600 MiB, and 1,024 MiB are free"),
        ],
        ids=str,
    )
    def test_each_obstacle_is_named(self, facts, reason):
        assert reason in obstacle_to_capture(Facts(**facts))

    def test_every_fact_is_among_them(self):
        named = {name for row in self.test_each_obstacle_is_named.pytestmark[0].args[1] for name in row[0]}
        assert named | {"captured_type"} == {field.name for field in fields(Facts)}

    @pytest.mark.parametrize("free", [None, 2**30])
    def test_memory_that_is_enough_or_unknown_is_no_obstacle(self, free):
        assert obstacle_to_capture(Facts(needed_bytes=500 * 2**20, free_bytes=free)) is None

    def test_what_is_trained_besides_is_an_input_and_no_obstacle(self):
        assert obstacle_to_capture(Facts(num_trained=100)) is None


def with_dropout(model):
    base_of(model).text_model.encoder.layers[0].self_attn.dropout = 0.5


def with_checkpointing(model):
    model.gradient_checkpointing_enable()


def with_hook(model):
    base_of(model).text_model.encoder.layers[0].mlp.register_forward_hook(lambda *args: None)


def with_backward_hook(model):
    base_of(model).text_model.final_layer_norm.register_full_backward_hook(lambda *args: None)


def with_a_forward_of_its_own(model):
    norm = base_of(model).text_model.final_layer_norm
    norm.forward = types.MethodType(type(norm).forward, norm)


def with_an_unknown_module(model):
    class Counting(torch.nn.Linear):
        pass

    base_of(model).text_projection.__class__ = Counting


def with_an_unknown_tensor(model):
    class Packed(torch.nn.Parameter):
        pass

    projection = base_of(model).text_projection
    projection.weight = Packed(projection.weight.detach(), requires_grad=False)


def with_chunks(model):
    base_of(model).class_encoder.batch_size = 2


OBSTACLES = {
    with_dropout: "dropout",
    with_checkpointing: "gradient checkpointing",
    with_hook: "hooks",
    with_backward_hook: "hooks",
    with_a_forward_of_its_own: "hooks",
    with_an_unknown_module: r"module of the class \S+Counting",
    with_an_unknown_tensor: "weight of the class Packed",
    with_chunks: "in 2 chunks",
}


class TestObstacles:
    """Where there can be no graph, the ordinary way is taken, and it is said why."""

    def check(self, model, reason, twin=None, **inputs):
        twin = eager_twin(model) if twin is None else twin
        for _ in range(2):
            torch.manual_seed(0)
            expected = step(twin, **inputs)
            torch.manual_seed(0)
            assert_same_results(step(model, **inputs), expected, "cpu")
        assert captured_of(model) is None
        told = base_of(model).class_encoder._graphs._told
        assert len(told) == 1 and reason in next(iter(told))

    @pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
    def test_a_change_of_the_model(self, model, change, caplog):
        step(model)
        assert captured_of(model) is not None
        change(model)
        twin = eager_twin(model)
        with caplog.at_level(logging.DEBUG, LOGGER):
            for _ in range(2):
                results = []
                for m in (model, twin):
                    torch.manual_seed(0)
                    results.append(step(m))
                assert_same_results(*results, "cpu")
        assert captured_of(model) is None
        assert engine_of(model).num_captures == 1
        (line,) = caplog.messages
        assert re.search(OBSTACLES[change], line)

    def test_hooks_for_all_modules(self, model):
        step(model)
        hook = register_module_forward_hook(lambda *args: None)
        try:
            assert_as_eager(model)
            assert captured_of(model) is None
        finally:
            hook.remove()
        assert_as_eager(model)
        assert captured_of(model) is not None

    def test_dropout_of_other_adapters(self):
        config = LoraConfig(r=2, target_modules=r"text_model.*q_proj", lora_dropout=0.5)
        model = graphed(get_peft_model(new_classifier(NAMES), config), cuda_graph="auto")
        self.check(model, "dropout")

    def test_vectors_for_each_image(self):
        self.check(new_model(image_conditioned=True), "every image")

    def test_random_numbers_from_anywhere(self, model, monkeypatch):
        forward = CLIPMLP.forward
        monkeypatch.setattr(CLIPMLP, "forward", lambda mlp, x: forward(mlp, x) + torch.rand(()))
        self.check(model, "random numbers")

    def test_buffers_that_change(self, model, monkeypatch):
        forward, embeddings = CLIPMLP.forward, base_of(model).text_model.embeddings

        def changing(mlp, states):
            embeddings.position_ids.add_(0)
            return forward(mlp, states)

        monkeypatch.setattr(CLIPMLP, "forward", changing)
        assert_as_eager(model)
        assert captured_of(model) is None

    def test_weights_that_functions_of_others_get(self, monkeypatch):
        class Shift(torch.autograd.Function):
            @staticmethod
            def forward(ctx, states, bias):
                return states + bias

            @staticmethod
            def backward(ctx, gradient):
                return gradient, gradient.sum((0, 1))

        forward = CLIPMLP.forward
        monkeypatch.setattr(CLIPMLP, "forward", lambda mlp, x: Shift.apply(forward(mlp, x), mlp.fc2.bias))
        model = new_model()
        base_of(model).text_model.encoder.layers[0].mlp.fc2.bias.requires_grad_(True)
        self.check(model, "cannot be followed")

    def test_weights_without_a_version_are_an_error_of_torch_as_ever(self, model):
        with torch.inference_mode():
            bias = base_of(model).text_model.final_layer_norm.bias.clone()
        norm = base_of(model).text_model.final_layer_norm
        del norm.bias
        norm.register_buffer("bias", bias)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            step(model)

    def test_too_little_memory(self, model, monkeypatch):
        monkeypatch.setattr("clip_prompt_peft.text.graph.free_bytes", lambda device: 2**20)
        self.check(model, "MiB are free")

    def test_classes_that_processes_share(self, model, monkeypatch):
        encoder = "clip_prompt_peft.text.encoder"
        monkeypatch.setattr(f"{encoder}.num_processes", lambda: 2)
        monkeypatch.setattr(f"{encoder}.share_of_classes", range)
        monkeypatch.setattr(f"{encoder}.gather_shares", lambda share, num_classes: share)
        base_of(model).class_encoder.across_processes = True
        self.check(model, "processes share")

    def test_a_device_whose_work_cannot_be_captured(self, model):
        graphed(model, CudaEngine(), "auto")
        self.check(model, "device of type 'cpu'")

    @pytest.mark.parametrize("mode", [torch.autograd.detect_anomaly, lambda: FlopCounterMode(display=False)])
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_modes_that_see_every_operation(self, model, mode):
        step(model)
        with mode():
            assert_as_eager(model)
        assert captured_of(model).num_replays == 1
        step(model)
        assert captured_of(model).num_replays == 2  # the graph outlives the mode

    def test_transforms_of_torch_func(self, model):
        name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)

        def loss(vectors):
            return torch.func.functional_call(model, {name: vectors}, kwargs=batch_for(model)).loss

        found = torch.func.grad(loss)(parameter.detach())
        expected = torch.autograd.grad(loss(parameter), parameter)[0]
        torch.testing.assert_close(found, expected)

    def test_forward_mode_differentiation(self):
        results = []
        for cuda_graph in (False, "auto"):
            model = new_model(cuda_graph)
            model.set_attn_implementation("eager")
            name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
            with forward_ad.dual_level():
                vectors = forward_ad.make_dual(parameter.detach(), torch.ones_like(parameter))
                output = torch.func.functional_call(model, {name: vectors}, kwargs=batch_for(model))
                results.append(forward_ad.unpack_dual(output.loss).tangent)
        assert results[0] is not None and torch.equal(*results)

    def test_without_gradients_or_out_of_training_nothing_is_captured_or_said(self, model, caplog):
        with caplog.at_level(logging.DEBUG, LOGGER):
            with torch.no_grad():
                base_of(model).get_class_embeds()
            model.eval()
            assert base_of(model).get_class_embeds().requires_grad
        assert engine_of(model).num_captures == 0 and not caplog.messages

    @needs_compile
    @pytest.mark.slow
    def test_a_compiled_model(self, model):
        expected = step(eager_twin(model))
        found = step(torch.compile(model, backend="eager"))
        assert_same_results(found, expected, "cpu", 1e-5, to_the_bit=False)
        assert engine_of(model).num_captures == 0


class TestSetting:
    def test_it_is_off_by_default(self, caplog):
        classifier = new_classifier(NAMES)
        assert classifier.class_encoder.cuda_graph is False
        model = prompted(classifier).train()
        with caplog.at_level(logging.DEBUG, LOGGER):
            step(model)
        assert not caplog.messages

    def test_true_warns_once_for_each_reason(self):
        model = new_model(True, image_conditioned=True)
        with pytest.warns(UserWarning, match="without a captured CUDA graph, since every image has") as warned:
            for _ in range(3):
                step(model)
        assert len(warned) == 1

    def test_true_warns_on_a_cpu(self):
        model = graphed(prompted(new_classifier(NAMES)), CudaEngine(), True)
        with pytest.warns(UserWarning, match="since the text tower is on a device of type 'cpu'.*cuda_graph='auto'"):
            step(model)

    @pytest.mark.parametrize("value", ["yes", 2, None])
    def test_other_values_are_refused(self, value):
        model = new_model(value)
        with pytest.raises(ValueError, match=f"cuda_graph must be True, False or 'auto', got {value!r}"):
            step(model)

    def test_it_is_an_argument_and_part_of_copies(self):
        encoder = ClassEncoder(cuda_graph="auto")
        assert encoder.__getstate__()["cuda_graph"] == "auto"

    def test_pickles_of_earlier_versions_are_without_it(self):
        encoder = ClassEncoder.__new__(ClassEncoder)
        encoder.__setstate__({"path": "cut", "batch_size": None, "across_processes": False})
        assert encoder.cuda_graph is False and encoder.path == "cut"


def test_other_zero_shot_embeddings_of_the_classes_are_captured_anew():
    model = new_model(class_aware_layer=1)
    classifier, encoder = base_of(model), base_of(model).class_encoder
    inputs = (classifier, classifier.class_prompts, classifier.prompt_layout)
    for seed in (1, 2):
        torch.manual_seed(seed)
        priors = torch.nn.functional.normalize(torch.randn(len(NAMES), classifier.embed_width), dim=-1)
        expected = ClassEncoder()(*inputs, class_priors=priors)
        assert torch.equal(encoder(*inputs, class_priors=priors), expected)
    assert engine_of(model).num_captures == 2


class TestEffort:
    def test_a_failed_capture_says_why_once(self, model, caplog):
        engine_of(model).error = RuntimeError("no such stream")
        with caplog.at_level(logging.DEBUG, LOGGER):
            for _ in range(3):
                step(model)
        (line,) = caplog.messages
        assert "the capture has failed (RuntimeError: no such stream)" in line
        assert engine_of(model).num_captures == 1

    def test_an_error_of_the_model_is_told_as_ever(self, model):
        base_of(model).class_encoder.path = "packed"
        base_of(model).text_model.config.is_causal = False
        with pytest.raises(ValueError, match="path='packed' would not give"):
            step(model)

    def test_classes_drawn_anew_for_every_step_are_not_captured_for_ever(self, model):
        twin = eager_twin(model)
        for number in range(8):
            for m in (model, twin):
                base_of(m).set_class_names(["cat", f"dog {number}"])
            assert_as_eager(model, twin)
        assert engine_of(model).num_captures == 2

    def test_the_state_of_a_tower_is_compared_without_its_values(self, model):
        parts = text_side(base_of(model))
        before = TowerState(parts)
        next(p for p in before.trained).data.add_(1)
        assert TowerState(parts) == before
        with torch.no_grad():
            base_of(model).text_projection.weight.add_(1)
        assert TowerState(parts) != before

    def test_a_tensor_among_the_settings_of_a_module_is_compared_by_identity(self, model):
        parts = text_side(base_of(model))
        parts[0].own = torch.ones(3)
        before = TowerState(parts)
        assert TowerState(parts) == before
        parts[0].own = torch.ones(3)
        assert TowerState(parts) != before

    def test_the_stand_in_would_notice_results_that_are_not_copied(self):
        engine, value = StandIn(), torch.zeros(2)
        (((result,), replay),) = engine.capture(torch.device("cpu"), [lambda: [value + 1]], list)
        kept = result
        value += 1
        replay()
        assert kept.tolist() == [2, 2]


class Card:
    """Writes down what the engine asks of `torch.cuda`. Its graphs compute nothing."""

    def __init__(self):
        self.events, self.stream_now = [], "main"

    @contextlib.contextmanager
    def stream(self, name):
        before, self.stream_now = self.stream_now, name
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.events.append(("capture", pool, str(stream), capture_error_mode))
        self.stream_now = stream
        yield  # as that of torch, it leaves its stream behind after an error
        self.stream_now = "main"

    def put_in(self, monkeypatch):
        class Stream(str):
            def __new__(cls, device):
                return super().__new__(cls, f"side of {device}")

            def wait_stream(self, other):
                pass

        main = Stream("cuda:0")
        self.stream_now = main
        for name, value in {
            "Stream": Stream,
            "stream": self.stream,
            "graph": self.graph,
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device=None: self.stream_now,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: self.events.append("replay")),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("clip_prompt_peft.text.graph._side_stream", lambda device: Stream("the engine"))
        return main


class TestCallsOfTheEngine:
    """What can be seen of CUDA graphs without a card: the calls that make them."""

    @pytest.fixture
    def card(self, monkeypatch):
        card = Card()
        card.main = card.put_in(monkeypatch)
        return card

    def test_it_warms_up_on_a_side_stream_and_captures_into_one_pool(self, card):
        functions = [
            lambda name=name: card.events.append((name, str(card.stream_now))) or [torch.ones(1)] for name in "fb"
        ]
        forget = functools.partial(card.events.append, "forget")
        replayables = CudaEngine().capture(torch.device("cuda:0"), functions, forget)
        side = "side of the engine"
        capture = ("capture", "pool", side, "thread_local")
        assert card.events == [("f", side), ("b", side)] * 3 + ["forget"] + [
            *(capture, ("f", side)),
            *(capture, ("b", side)),
            "forget",
        ]
        assert card.stream_now == card.main
        for results, replay in replayables:
            replay()
            assert len(results) == 1
        assert card.events[-2:] == ["replay", "replay"]

    def test_after_a_failure_the_current_stream_is_the_old_one(self, card):
        def failing():
            if any(event[0] == "capture" for event in card.events):
                raise RuntimeError("not permitted")
            return [torch.ones(1)]

        with pytest.raises(RuntimeError, match="not permitted"):
            CudaEngine().capture(torch.device("cuda:0"), [failing], list)
        assert card.stream_now == card.main
