"""Class embeddings from a captured graph are those of the ordinary way, whatever the training loop does with them.

The same bodies run with CUDA graphs on a card, and with a stand-in on the CPU that keeps its results in place as well.
"""

import copy
import functools
import gc
import io
import itertools
import pickle
import threading
import time
import weakref

import pytest
import torch
from adapters import as_if_trained, base_of, prompted
from cases import new_classifier
from conftest import slow_param
from datasets import Dataset
from graph_engines import (
    assert_as_eager,
    assert_same_results,
    batch_for,
    captured_of,
    eager_twin,
    engine_of,
    gradients_of,
    graphed,
    step,
)
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import PRESETS, CLIPPromptTuningConfig, ProGradTrainer


NAMES = ["cat", "golden retriever", "lily of the valley", "food"]
OTHER_NAMES = ["dog", "Boeing 737-800", "x-ray image", "a very long name of a class"]
PRECISIONS = {  # dtype of autocast, dtype of the frozen weights, how far results may be apart on a card
    "fp32": (None, torch.float32, 1e-6),
    "bf16 autocast": (torch.bfloat16, torch.float32, 1e-2),
    "fp16 autocast": (torch.float16, torch.float32, 2e-3),
    "bf16 weights": (None, torch.bfloat16, 1e-2),
    "fp16 weights": (None, torch.float16, 2e-3),
}


@pytest.fixture(params=["stand-in", pytest.param("CUDA", marks=pytest.mark.gpu)])
def place(request):
    """The device that a test computes on."""
    if request.param == "stand-in":
        return torch.device("cpu")
    device = request.getfixturevalue("device")
    if device.type != "cuda":
        pytest.skip("the stand-in is tried by itself")
    return device


@pytest.fixture
def card(place):
    if place.type != "cuda":
        pytest.skip("needs a card")
    return place


def prompts_on(place, **fields):
    return graphed(as_if_trained(prompted(new_classifier(NAMES), **fields)).to(place))


def lora_on(place, **fields):
    config = LoraConfig(r=2, target_modules=r"text_model.*(q_proj|fc1)|text_projection", **fields)
    return graphed(as_if_trained(get_peft_model(new_classifier(NAMES), config)).to(place))


def lora_beside_prompts_on(place):
    classifier = new_classifier(NAMES)
    model = prompted(classifier)
    classifier.add_adapter(LoraConfig(r=2, target_modules=r"text_model.*q_proj"), adapter_name="lora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "learnable" in name)
    return graphed(as_if_trained(model).to(place))


def positions_on(place):
    classifier = new_classifier(NAMES).requires_grad_(False)
    classifier.text_model.embeddings.position_embedding.requires_grad_(True)
    return graphed(classifier.to(place))


def both(model):
    """The model, and one in the ordinary way."""
    return model, eager_twin(model)


def other_adapter():
    return CLIPPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDOM")


MODELS = {
    "prompts": prompts_on,
    "prompts of each class": lambda place: prompts_on(place, class_specific=True),
    "prompts in deeper layers": lambda place: prompts_on(place, text_prompt_depth=2),
    "class name in the middle": lambda place: prompts_on(place, class_token_position="middle"),
    "lora": lora_on,
    "dora": lambda place: lora_on(place, use_dora=True),
    "lora beside prompts": lora_beside_prompts_on,
    "positions": positions_on,
}
QUICK = [*((kind, "fp32") for kind in MODELS), ("prompts", "bf16 autocast"), ("lora", "bf16 autocast")]
KINDS = [
    *QUICK,
    *(pytest.param(*row, marks=pytest.mark.slow) for row in itertools.product(MODELS, PRECISIONS) if row not in QUICK),
]


class TestValuesAndGradients:
    @pytest.mark.parametrize(("kind", "precision"), KINDS)
    def test_they_are_those_of_the_ordinary_way(self, place, kind, precision):
        autocast, dtype, tolerance = PRECISIONS[precision]
        model = MODELS[kind](place)
        for parameter in model.parameters():
            if kind == "positions" or not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        twin = eager_twin(model)
        for seed in range(3):
            inputs = batch_for(model, seed)
            assert_as_eager(model, twin, tolerance, autocast=autocast, **inputs)
        assert engine_of(model).num_captures == 1
        assert captured_of(model).num_replays == 3

    @pytest.mark.parametrize("path", ["packed", "cut", "plain"])
    def test_so_they_are_on_every_path(self, place, path):
        model = prompts_on(place)
        base_of(model).class_encoder.path = path
        assert_as_eager(model)
        assert captured_of(model) is not None

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_and_with_every_attention(self, place, attention):
        model = prompts_on(place)
        model.set_attn_implementation(attention)
        assert_as_eager(model)
        assert captured_of(model) is not None

    @pytest.mark.parametrize(
        "preset", [name if name in ("coop", "cocoop", "maple") else slow_param(name) for name in PRESETS]
    )
    def test_every_preset_trains_as_in_the_ordinary_way(self, place, preset, pixel_values, labels):
        classifier = new_classifier(NAMES)
        config = CLIPPromptTuningConfig.from_preset(preset, model=classifier)
        model = graphed(as_if_trained(get_peft_model(classifier, config), std=0.02).to(place), cuda_graph="auto")
        inputs = {"pixel_values": pixel_values.to(place), "labels": labels.to(place)}
        twin = eager_twin(model)
        for _ in range(2):
            assert_as_eager(model, twin, 1e-4, **inputs)
        is_captured = preset not in ("cocoop", "vpt-shallow", "vpt-deep")  # which train nothing that could be
        assert engine_of(model).num_captures == is_captured

    def test_a_hundred_steps_of_training_end_alike(self, place):
        model = prompts_on(place)
        twin = eager_twin(model)
        optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01, fused=True)
            for m in (model, twin)
        ]
        for seed in range(100 if place.type == "cuda" else 15):
            inputs = batch_for(model, seed)
            found, expected = (step(m, o, **inputs) for m, o in zip((model, twin), optimizers))
            assert_same_results(found, expected, place, 1e-3)  # differences grow from step to step
        assert engine_of(model).num_captures == 1

    @pytest.mark.slow
    def test_the_stock_trainer_ends_with_the_same_vectors(self, place, tmp_path):
        ends = []
        for cuda_graph in (False, "auto"):
            torch.manual_seed(0)
            model = graphed(prompted(new_classifier(NAMES)), cuda_graph=cuda_graph)
            inputs = batch_for(model, size=8)
            data = Dataset.from_dict({name: value.tolist() for name, value in inputs.items()}).with_format("torch")
            args = TrainingArguments(
                str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                report_to=[], disable_tqdm=True, use_cpu=place.type == "cpu", save_strategy="no", learning_rate=0.01,
            )  # fmt: skip
            graphed(model.to(place), cuda_graph=cuda_graph)
            Trainer(model, args, train_dataset=data).train()
            assert engine_of(model).num_captures == bool(cuda_graph)
            ends.append([p.detach().cpu() for p in model.parameters() if p.requires_grad])
        for one, another in zip(*ends, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=1e-5 if place.type == "cuda" else 0)

    @pytest.mark.slow
    def test_prograd_takes_two_gradients_of_one_forward(self, place, tmp_path):
        ends = []
        for cuda_graph in (False, "auto"):
            torch.manual_seed(0)
            config = CLIPPromptTuningConfig(num_virtual_tokens=4, regularizer="prograd")
            model = as_if_trained(get_peft_model(new_classifier(NAMES), config)).to(place)
            inputs = batch_for(model, size=8)
            data = {name: value.tolist() for name, value in inputs.items()}
            args = TrainingArguments(
                str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
                use_cpu=place.type == "cpu", save_strategy="no", learning_rate=0.01,
            )  # fmt: skip
            graphed(model, cuda_graph=cuda_graph)
            ProGradTrainer(model, args, train_dataset=Dataset.from_dict(data).with_format("torch")).train()
            assert engine_of(model).num_captures == bool(cuda_graph)
            ends.append([p.detach().cpu() for p in model.parameters() if p.requires_grad])
        for one, another in zip(*ends, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=1e-5 if place.type == "cuda" else 0)


class TestBuffers:
    """Nothing leaves the graph that a later replay writes over."""

    def test_results_of_earlier_steps_stay_as_they_were(self, place):
        model = prompts_on(place)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        results, copies = [], []
        for seed in range(3):
            embeds = base_of(model).get_class_embeds()
            model.zero_grad()
            embeds[seed].sum().backward()
            results += [embeds.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            copies += [result.clone() for result in results[len(copies) :]]
            optimizer.step()
        assert all(map(torch.equal, results, copies))
        assert not torch.equal(results[0], results[2])

    def test_gradients_are_added_up(self, place):
        model = prompts_on(place)
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        gradients = []
        for factors in ([1], [10], [1, 10]):
            parameter.grad = None
            for factor in factors:
                (factor * base_of(model).get_class_embeds()[0].sum()).backward()
            gradients.append(parameter.grad.clone())
        torch.testing.assert_close(gradients[1], 10 * gradients[0])
        torch.testing.assert_close(gradients[2], 11 * gradients[0])

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_gradients_can_be_set_to_zero_in_place(self, place, set_to_none):
        model = prompts_on(place)
        twin = eager_twin(model)
        for seed in range(3):
            for m in (model, twin):
                m.zero_grad(set_to_none=set_to_none)
                for part in range(2):
                    m(**batch_for(m, 10 * seed + part)).loss.backward()
            assert_same_results((None, gradients_of(model)), (None, gradients_of(twin)), place)

    @pytest.mark.parametrize("is_changed", [False, True])
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_a_second_forward_may_come_before_the_first_backward(self, place, order, is_changed):
        results = []
        for model in both(prompts_on(place)):
            (parameter,) = [p for p in model.parameters() if p.requires_grad]
            embeds = [base_of(model).get_class_embeds()]
            if is_changed:
                parameter.data.mul_(1.5)
            embeds.append(base_of(model).get_class_embeds())
            gradients = [torch.autograd.grad(embeds[i][i].sum(), parameter)[0] for i in order]
            results.append((embeds[0].detach(), [embeds[1].detach(), *gradients]))
        assert_same_results(*results, place)

    def test_a_forward_can_have_two_gradients(self, place):
        model = prompts_on(place)
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        embeds = base_of(model).get_class_embeds()
        first, second = (
            torch.autograd.grad(embeds[index].sum(), parameter, retain_graph=True)[0] for index in range(2)
        )
        again = torch.autograd.grad(embeds[0].sum(), parameter)[0]
        assert torch.equal(first, again) and not torch.equal(first, second)

    def test_many_forwards_can_wait_for_one_backward(self, place):
        model = prompts_on(place)
        twin = eager_twin(model)
        for m in (model, twin):
            sum(m(**batch_for(m, seed)).loss for seed in range(4)).backward()
        assert_same_results((None, gradients_of(model)), (None, gradients_of(twin)), place, 1e-5)

    def test_a_gradient_can_be_differentiated(self, place):
        results, original = [], prompts_on(place)
        original.set_attn_implementation("eager")  # the other has no second derivative
        for model in both(original):
            (parameter,) = [p for p in model.parameters() if p.requires_grad]
            loss = model(**batch_for(model)).loss
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
            second = torch.autograd.grad(gradient.square().sum(), parameter)[0]
            results.append((gradient.detach(), [second]))
        assert_same_results(*results, place, 1e-4, to_the_bit=False)

    def test_a_frozen_weight_that_is_changed_before_the_backward_pass_is_an_error(self, place):
        model = prompts_on(place)
        loss = model(**batch_for(model)).loss
        with torch.no_grad():
            base_of(model).text_projection.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_frozen_weight_that_is_replaced_before_the_backward_pass_is_not_missed(self, place):
        results = []
        for model in both(prompts_on(place)):
            loss = model(**batch_for(model)).loss
            weight = base_of(model).text_projection.weight
            weight.data = 2 * weight.data
            loss.backward()
            results.append((loss.detach(), gradients_of(model)))
        assert_same_results(*results, place)

    def test_vectors_that_another_network_makes_hand_their_gradient_on(self, place):
        model = prompts_on(place)
        name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
        gradients = []
        for m in both(model):
            factor = torch.tensor(2.0, device=place, requires_grad=True)
            for _ in range(3 if place.type == "cuda" else 1):  # the stand-in knows tensors by their objects
                vectors = factor * parameter.detach()
                torch.func.functional_call(m, {name: vectors}, kwargs=batch_for(m)).loss.backward()
            gradients.append(factor.grad)
        assert_same_results((None, gradients[:1]), (None, gradients[1:]), place, 1e-5)
        assert engine_of(model).num_captures == 1

    def test_embeddings_that_are_changed_in_place_change_no_other_step(self, place):
        model = prompts_on(place)
        with torch.no_grad():
            base_of(model).get_class_embeds().zero_()
        embeds = base_of(model).get_class_embeds()
        embeds.detach().zero_()
        assert_as_eager(model)


class TestLoops:
    def test_a_gradient_scaler_finds_what_it_would_find(self, place):
        results = []
        for model in both(prompts_on(place)):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            scaler = torch.amp.GradScaler(place.type, init_scale=2.0**10, growth_interval=1)
            for seed in range(3):
                model.zero_grad()
                with torch.autocast(place.type, torch.float16):
                    loss = model(**batch_for(model, seed)).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(
                (torch.tensor(scaler.get_scale()), [p.detach() for p in optimizer.param_groups[0]["params"]])
            )
        assert_same_results(*results, place, 2e-3)

    def test_distributed_data_parallel_gets_the_same_gradients(self, place):
        model = prompts_on(place)
        expected = step(eager_twin(model))
        backend = "nccl" if place.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(model)
            for _ in range(3):
                model.zero_grad()
                output = parallel(**batch_for(model))
                output.loss.backward()
                assert_same_results((output.logits.detach(), gradients_of(model)), expected, place)
        finally:
            torch.distributed.destroy_process_group()
        assert engine_of(model).num_captures == 1

    def test_evaluation_in_between_and_modes_without_gradients_replay_nothing(self, place):
        model = prompts_on(place)
        step(model)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not base_of(model).get_class_embeds().requires_grad
                model.eval()
                assert not base_of(model).get_class_embeds().requires_grad
                model.train()
        assert captured_of(model).num_replays == 1
        assert_as_eager(model)
        assert engine_of(model).num_captures == 1

    def test_the_random_state_afterwards_is_that_of_the_ordinary_way(self, place):
        model = prompts_on(place)
        drawn = []
        for m in (model, eager_twin(model)):
            torch.manual_seed(3)
            for _ in range(2):
                step(m)
            drawn.append((torch.randn(3), torch.randn(3, device=place)))
        assert all(map(torch.equal, *drawn))

    def test_threads_that_train_one_model_get_their_own_gradients(self, place):
        model = prompts_on(place)
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        count = len(NAMES)
        expected = [torch.autograd.grad(eager_embeds(model)[i].sum(), parameter)[0] for i in range(count)]
        found, errors, all_are_here = {}, [], threading.Barrier(count, timeout=30)
        step(model)
        if place.type == "cpu":
            engine_of(model).engine.delay = 0.01

        def work(index):
            try:
                for _ in range(4):
                    embeds = base_of(model).get_class_embeds()
                    all_are_here.wait()
                    found[index] = torch.autograd.grad(embeds[index].sum(), parameter)[0]
                    torch.testing.assert_close(found[index], expected[index], rtol=1e-5, atol=1e-6)
            except Exception as error:
                errors.append(error)
                all_are_here.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert engine_of(model).num_captures == 1


def eager_embeds(model):
    encoder = base_of(model).class_encoder
    encoder.cuda_graph, setting = False, encoder.cuda_graph
    try:
        return base_of(model).get_class_embeds()
    finally:
        encoder.cuda_graph = setting


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
    @pytest.mark.parametrize("how", [slow_param("clear"), "change", "deletion", "eval elsewhere", slow_param("off")])
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
            model.eval().to("meta" if place.type == "cpu" else "cpu")
            with torch.no_grad():
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
