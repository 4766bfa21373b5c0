"""Class embeddings from a captured graph are those of the ordinary way, whatever the training loop does with them.

The same bodies run with CUDA graphs on a card, and with a stand-in on the CPU that keeps its results in place as well.
"""

import itertools
import threading

import pytest
import torch
from adapters import as_if_trained, base_of, prompted
from cases import new_classifier
from conftest import slow_param
from datasets import Dataset
from graph_engines import (
    NAMES,
    assert_as_eager,
    assert_same_results,
    batch_for,
    both,
    captured_of,
    eager_embeds,
    eager_twin,
    engine_of,
    gradients_of,
    graphed,
    lora_beside_prompts_on,
    lora_on,
    positions_on,
    prompts_on,
    step,
)
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import PRESETS, CLIPPromptTuningConfig, ProGradTrainer


PRECISIONS = {  # dtype of autocast, dtype of the frozen weights, how far results may be apart on a card
    "fp32": (None, torch.float32, 1e-6),
    "bf16 autocast": (torch.bfloat16, torch.float32, 1e-2),
    "fp16 autocast": (torch.float16, torch.float32, 2e-3),
    "bf16 weights": (None, torch.bfloat16, 1e-2),
    "fp16 weights": (None, torch.float16, 2e-3),
}


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
        # these train nothing that could be, or do not encode texts at all
        is_captured = preset not in ("cocoop", "vpt-shallow", "vpt-deep", "promptkd")
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
