"""A captured class encoder notices what it depends on, gives its memory back, and bears what a card does besides."""

import copy
import functools
import gc
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
from adapters import base_of
from conftest import slow_param
from graph_engines import (
    NAMES,
    OTHER_NAMES,
    assert_as_eager,
    assert_same_results,
    batch_for,
    captured_of,
    eager_twin,
    engine_of,
    graphed,
    lora_on,
    other_adapter,
    prompts_on,
    step,
)


CHANGES = {
    "classes": lambda model: base_of(model).set_class_names(OTHER_NAMES),
    "fewer classes": lambda model: base_of(model).set_class_names(NAMES[:2]),
    "adapter": lambda model: model.set_adapter("other"),
    "disabled adapter": lambda model: model.base_model.disable_adapter_layers(),
    "merged adapter": lambda model: model.merge_adapter(),
    "dtype": lambda model: base_of(model).to(torch.bfloat16),
    "values of a weight": lambda model: base_of(model).text_projection.weight.data.mul_(2),
    "other memory of a weight": lambda model: swap(base_of(model).text_projection.weight),
    "other parameter": lambda model: replace_weight(base_of(model).text_projection),
    "more that is trained": lambda model: base_of(model).text_projection.weight.requires_grad_(True),
    "attention": lambda model: base_of(model).set_attn_implementation("eager"),
    "path": lambda model: setattr(base_of(model).class_encoder, "path", "plain"),
    "a scale of a module": lambda model: setattr(first_layer(model).layer_norm1, "eps", 0.1),
    "a module": lambda model: setattr(first_layer(model), "mlp", copy.deepcopy(first_layer(model).mlp)),
    "new vectors": lambda model: swap(next(p for p in model.parameters() if p.requires_grad)),
}

RARE = ("fewer classes", "disabled adapter", "dtype", "attention", "path", "a scale of a module")


class TestChanges:
    """What a captured graph depends on is noticed when it changes."""

    @pytest.mark.parametrize("change", [slow_param(name) if name in RARE else name for name in CHANGES])
    def test_a_step_afterwards_is_that_of_the_ordinary_way(self, place, change):
        model = prompts_on(place)
        model.add_adapter("other", other_adapter())
        model.train()
        twin = eager_twin(model)
        assert_as_eager(model, twin)
        with torch.no_grad():
            for m in (model, twin):
                CHANGES[change](m)
        if change in ("disabled adapter", "merged adapter"):  # so that nothing in effect is trained
            return self.check_logits(model, twin)
        for _ in range(2):
            assert_as_eager(model, twin, 1e-2 if change == "dtype" else 1e-5)
        anew = 1 if change in ("new vectors", "values of a weight") else 2  # which the graph reads where they are
        assert engine_of(model).num_captures == anew

    def check_logits(self, model, twin):
        found, expected = (m(**batch_for(m)).logits.detach() for m in (model, twin))
        assert_same_results((found, []), (expected, []), base_of(model).device, 1e-5)

    def test_a_counted_change_of_a_weight_is_captured_anew(self, place):
        model = prompts_on(place)
        twin = eager_twin(model)
        assert_as_eager(model, twin)
        for m in (model, twin):
            with torch.no_grad():
                base_of(m).text_projection.weight.mul_(2)
        assert_as_eager(model, twin)
        assert engine_of(model).num_captures == 2

    def test_so_it_is_with_and_without_autocast(self, place):
        model = prompts_on(place)
        twin = eager_twin(model)
        for autocast in (None, torch.bfloat16, None):
            for _ in range(3):
                assert_as_eager(model, twin, 1e-2, autocast=autocast)
        assert engine_of(model).num_captures == 3

    def test_steps_within_one_autocast_use_no_casts_of_earlier_ones(self, place):
        model = lora_on(place)
        twin, found, expected = eager_twin(model), [], []
        autocast = functools.partial(torch.autocast, place.type, torch.bfloat16)
        with autocast():
            for factor in (1, 2, 1.5):
                scale_trained(model, factor)
                found.append(model(**batch_for(model)).logits.detach())
        for factor in (1, 2, 1.5):
            scale_trained(twin, factor)
            with autocast():
                expected.append(twin(**batch_for(twin)).logits.detach())
        assert_same_results((None, found), (None, expected), place, 2e-2)
        assert engine_of(model).num_captures == 1

    def test_adapters_that_take_turns_are_right_and_not_captured_every_time(self, place):
        model = prompts_on(place)
        model.add_adapter("other", other_adapter())
        model.train()
        twin = eager_twin(model)
        for index in range(8):
            for m in (model, twin):
                m.set_adapter(["default", "other"][index % 2])
            assert_as_eager(model, twin)
        assert engine_of(model).num_captures == 2
        for _ in range(4):
            assert_as_eager(model, twin)
        assert engine_of(model).num_captures == 3  # once it stays, it is captured

    def test_a_move_to_another_device_and_back(self, card):
        model = prompts_on(card)
        twin = eager_twin(model)
        for place in (card, torch.device("cpu"), card):
            for m in (model, twin):
                m.to(place)
            assert_as_eager(model, twin, 1e-5)
            assert (captured_of(model) is not None) == (place.type == "cuda")

    def test_copies_and_pickles_have_no_graph_and_train_alike(self, place):
        model = prompts_on(place)
        step(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
        for twin in twins:
            assert captured_of(twin) is None
            assert base_of(twin).class_encoder.cuda_graph is True
            graphed(twin, engine_of(model))
            assert_as_eager(twin, tolerance=1e-5)
        assert_as_eager(model)


class TestMemory:
    @pytest.mark.parametrize(
        "how", [slow_param("clear"), "change", "deletion", "eval elsewhere", "training elsewhere", slow_param("off")]
    )
    def test_a_graph_that_is_not_needed_is_dropped(self, place, how):
        model = prompts_on(place)
        step(model)
        captured = weakref.ref(captured_of(model))
        if how == "clear":
            base_of(model).class_encoder.clear()
        elif how == "change":
            base_of(model).set_class_names(OTHER_NAMES)
            step(model)
        elif how == "deletion":
            del model
        elif how == "off":
            base_of(model).class_encoder.cuda_graph = False
            step(model)
        else:
            model.train(how == "training elsewhere").to("meta" if place.type == "cpu" else "cpu")
            with torch.set_grad_enabled(model.training):
                base_of(model).get_class_embeds()
        if place.type == "cpu":
            gc.collect()  # the stand-in holds on to the model
        assert captured() is None

    def test_a_card_gets_its_memory_back(self, card):
        torch.cuda.empty_cache()
        model = prompts_on(card)
        eager = eager_twin(model)
        step(eager)
        del eager
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(card)
        for names in (NAMES, OTHER_NAMES, NAMES, OTHER_NAMES):
            base_of(model).set_class_names(names)
            for _ in range(4):
                step(model)
        base_of(model).class_encoder.clear()
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # what a side stream keeps for good, such as a workspace of cuBLAS
        assert torch.cuda.memory_reserved(card) - before <= 96 * 2**20

    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory."), slow_param(RuntimeError("operation not permitted"))],
        ids=repr,
    )
    def test_a_capture_that_fails_leaves_the_ordinary_way(self, place, error, recwarn):
        model = graphed(prompts_on(place), cuda_graph="auto")
        engine_of(model).error = error
        for _ in range(3):
            assert_as_eager(model)
        assert engine_of(model).num_captures == 1  # not tried again
        assert engine_of(model).num_given_back == 1
        assert not recwarn.list
        engine_of(model).error = None
        base_of(model).set_class_names(OTHER_NAMES)
        for _ in range(2):
            assert_as_eager(model)
        assert captured_of(model) is not None

    def test_a_failed_capture_changes_no_stream_and_allows_the_next(self, card):
        model = graphed(prompts_on(card), cuda_graph="auto")
        stream = torch.cuda.current_stream(card)
        engine_of(model).error = RuntimeError("in the middle")
        step(model)
        assert torch.cuda.current_stream(card) == stream
        assert not torch.cuda.is_current_stream_capturing()

    def test_a_host_that_waits_in_the_capture_is_a_failure_only(self, card):
        model = graphed(prompts_on(card), cuda_graph="auto")
        forward = type(first_layer(model)).forward

        def waiting(layer, *args, **kwargs):
            output = forward(layer, *args, **kwargs)
            (output[0] if isinstance(output, tuple) else output).sum().item()
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(first_layer(model)), "forward", waiting)
            for _ in range(2):
                assert_as_eager(model)
        assert captured_of(model) is None

    @pytest.mark.slow
    def test_memory_does_not_grow_from_step_to_step(self, place):
        model = prompts_on(place)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        inputs = batch_for(model)
        end, held = time.monotonic() + 90, []
        for index in range(10_000 if place.type == "cuda" else 60):
            step(model, optimizer, **inputs)
            if index % 20 == 19:
                if place.type == "cuda":
                    held.append(torch.cuda.memory_allocated(place))
                else:
                    gc.collect()
                    held.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            if time.monotonic() > end:
                break
        assert held[-1] <= held[1]
        assert engine_of(model).num_captures == 1


class TestOnACard:
    def test_a_replayed_step_does_not_wait_for_the_card(self, card):
        model = prompts_on(card)
        inputs = batch_for(model)
        step(model, **inputs)
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_other_threads_may_allocate_while_it_captures(self, card):
        model = prompts_on(card)
        done, errors = threading.Event(), []

        def allocate():
            try:
                while not done.is_set():
                    torch.empty(2**20).pin_memory()
                    torch.empty(2**22, device=card)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=allocate)
        thread.start()
        try:
            for names in (NAMES, OTHER_NAMES, NAMES):
                base_of(model).set_class_names(names)
                for _ in range(4):
                    assert_as_eager(model)
        finally:
            done.set()
            thread.join()
        assert not errors
        assert engine_of(model).num_captures == 3

    def test_steps_on_other_streams_are_right(self, card):
        model = prompts_on(card)
        twin = eager_twin(model)
        for index in range(4):
            stream = torch.cuda.Stream(card) if index % 2 else torch.cuda.current_stream(card)
            stream.wait_stream(torch.cuda.current_stream(card))
            with torch.cuda.stream(stream):
                found = step(model, **batch_for(model, index))
            torch.cuda.current_stream(card).wait_stream(stream)
            assert_same_results(found, step(twin, **batch_for(model, index)), card, 1e-5)

    def test_a_capture_of_the_whole_step_by_somebody_else_finds_the_ordinary_way(self, card):
        model = graphed(prompts_on(card), cuda_graph="auto")
        twin = eager_twin(model)
        expected = base_of(twin).get_class_embeds().detach()
        stream = torch.cuda.Stream(card)
        stream.wait_stream(torch.cuda.current_stream(card))
        with torch.cuda.stream(stream):
            for _ in range(3):
                base_of(model).get_class_embeds()
        torch.cuda.current_stream(card).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            embeds = base_of(model).get_class_embeds().detach()
        graph.replay()
        torch.testing.assert_close(embeds, expected)


@torch.no_grad()
def scale_trained(model, factor):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(factor)


def first_layer(model):
    return base_of(model).text_model.encoder.layers[0]


def swap(parameter):
    parameter.data = parameter.data.clone()
    parameter.data.mul_(1.25)


def replace_weight(linear):
    linear.weight = torch.nn.Parameter(2 * linear.weight.data, requires_grad=False)
