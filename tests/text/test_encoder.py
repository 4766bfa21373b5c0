"""Class embeddings and gradients on the fast paths are those of the plain one."""

import copy
import pickle
from functools import partial
from unittest.mock import patch

import pytest
import torch
from adapters import as_if_trained, prompted
from class_embeds import assert_same, embeds_and_gradients
from conftest import TINY_CLIP, golden_base_folder, needs_compile, slow_param
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoTokenizer, CLIPConfig, CLIPModel, Trainer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip.modeling_clip import CLIPEncoder

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.text.chunks import encode_in_chunks


# one to many tokens, so that suffixes differ in length
NAMES = ["cat", "golden retriever", "x-ray image", "lily of the valley", "Boeing 737-800", "food", "Cat."]


def prompt_tuned(classifier, **fields):
    return as_if_trained(prompted(classifier, **fields))


def lora_tuned(classifier, dropout=0.0):
    targets = r"text_model.*(q_proj|v_proj|fc1)|text_projection"
    model = get_peft_model(classifier, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout))
    for name, parameter in classifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def position_tuned(classifier):
    """No adapter at all: a part of the text embeddings is trained."""
    classifier.requires_grad_(False)
    classifier.text_model.embeddings.position_embedding.requires_grad_(True)
    return classifier


ADAPTERS = {
    "prompt": prompt_tuned,
    "long_prompt_behind_a_word": partial(prompt_tuned, num_virtual_tokens=16, start_idx=2),
    "vectors_in_front_of_a_deeper_layer": partial(prompt_tuned, text_prompt_depth=2),
    "vectors_of_each_class": partial(prompt_tuned, class_specific=True),
    "class_name_in_the_middle": partial(prompt_tuned, class_token_position="middle"),
    "class_name_in_front_and_vectors_of_each_class": partial(
        prompt_tuned, class_token_position="front", class_specific=True
    ),
    "lora": lora_tuned,
    "positions": position_tuned,
}


@pytest.fixture(params=["narrow", slow_param("legacy_eos"), slow_param("fixed_eos")])
def base(request, tmp_path):
    """Two models that differ in width; of the second, both end token configurations."""
    return narrow_clip(tmp_path) if request.param == "narrow" else golden_base_folder(request.param, tmp_path)


def narrow_clip(folder):
    """Random weights, half as wide as the models that are there, with the tokenizer of the embedded one."""
    config = CLIPConfig.from_pretrained(TINY_CLIP)
    config.text_config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})
    config.vision_config.update({"num_hidden_layers": 1})
    CLIPModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_CLIP).save_pretrained(folder)
    return str(folder)


def load(base, class_names=NAMES, **kwargs):
    return CLIPForPromptClassification.from_pretrained(base, class_names=class_names, **kwargs).eval()


def plain_tokens(classifier):
    texts = [f"a photo of a {name}." for name in classifier.class_names]
    return classifier.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")


class TestPackedRows:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    @pytest.mark.parametrize(
        ("attention", "checkpointing"), [("eager", False), ("sdpa", True)], ids=["eager", "sdpa_checkpointing"]
    )
    def test_embeddings_and_gradients_are_those_of_plain_rows(self, base, attention, adapter, checkpointing):
        model = ADAPTERS[adapter](load(base, attn_implementation=attention))
        expected = embeds_and_gradients(model, path="plain")
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        for path in ("packed", "cut"):
            assert_same(embeds_and_gradients(model, path=path), expected)

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
    @pytest.mark.parametrize("settings", [{"path": "packed"}, {"path": "packed", "batch_size": 2}, {"path": "cut"}])
    def test_so_they_are_where_every_image_has_vectors_of_its_own(self, settings, checkpointing):
        classifier = load(TINY_CLIP)
        model = prompt_tuned(classifier, image_conditioned=True)
        image_embeds = torch.nn.functional.normalize(torch.randn(3, classifier.config.projection_dim), dim=-1)
        expected = embeds_and_gradients(model, image_embeds, path="plain", batch_size=None)
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        assert_same(embeds_and_gradients(model, image_embeds, **settings), expected)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_in_half_precision_they_are_no_further_from_float32_than_plain_rows(self, dtype, attention):
        model = prompt_tuned(load(TINY_CLIP, attn_implementation=attention))
        exact = embeds_and_gradients(model, path="plain")
        model.get_base_model().to(dtype)
        packed, plain = (embeds_and_gradients(model, path=path) for path in ("packed", "plain"))
        for actual, reference, wanted in zip((packed[0], *packed[1]), (plain[0], *plain[1]), (exact[0], *exact[1])):
            assert (actual - wanted).abs().max() <= 2 * (reference - wanted).abs().max()

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_under_autocast_they_are_no_further_from_float32_than_plain_rows(self, attention):
        model = prompt_tuned(load(TINY_CLIP, attn_implementation=attention))
        exact = embeds_and_gradients(model, path="plain")
        with torch.autocast("cpu", torch.bfloat16):
            packed, plain = (embeds_and_gradients(model, path=path) for path in ("packed", "plain"))
        for actual, reference, wanted in zip((packed[0], *packed[1]), (plain[0], *plain[1]), (exact[0], *exact[1])):
            assert (actual - wanted).abs().max() <= 2 * (reference - wanted).abs().max()

    @pytest.mark.parametrize(
        "names",
        [
            ["cat"],
            ["cat", "CAT"],  # the same tokens
            ["cat", "cat cat", "cat cat cat"],  # beginnings of each other
            slow_param([f"{word} {number}" for word in ("cat", "red car") for number in range(100)]),
            ["cat", " ".join(["cat"] * 69)],  # fills all positions
        ],
        ids=["one", "equal_tokens", "beginnings_of_each_other", "many", "as_long_as_can_be"],
    )
    def test_any_class_names_will_do(self, names):
        model = prompt_tuned(load(TINY_CLIP, names))
        assert_same(embeds_and_gradients(model, path="packed"), embeds_and_gradients(model, path="plain"))

    @pytest.mark.parametrize("template", ["{}", "{} on a photo", "a photo of a {}, seen from afar"])
    def test_zero_shot_prompts_of_any_template_are_packed_too(self, template):
        model = position_tuned(load(TINY_CLIP, prompt_template=template))
        assert_same(embeds_and_gradients(model, path="packed"), embeds_and_gradients(model, path="plain"))

    def test_prompts_that_are_merged_into_the_positions_come_out_the_same(self):
        model = prompt_tuned(load(TINY_CLIP))
        model.merge_adapter()
        model.requires_grad_(False)
        expected = embeds_and_gradients(position_tuned(model.get_base_model()), path="plain")
        assert_same(embeds_and_gradients(model, path="packed"), expected)

    def test_the_modules_that_users_and_adapters_see_are_not_touched(self):
        model = prompt_tuned(load(TINY_CLIP))
        before = {name: id(module) for name, module in model.named_modules()}
        embeds_and_gradients(model, path="packed")
        assert {name: id(module) for name, module in model.named_modules()} == before


class TestGoldenNumbers:
    @pytest.mark.parametrize("case", ["coop_shared_end_n4", "coop_shared_end_n16", "coop_ctxinit_end"])
    @pytest.mark.parametrize(("path", "batch_size"), [("packed", None), ("packed", 2), ("cut", 2), ("plain", None)])
    def test_logits_and_gradients_are_those_of_the_original_code(self, golden, golden_base, case, path, batch_size):
        case = golden(case)
        context = case["param.ctx"]
        template = case.info["settings"]["ctx_init"] or " ".join(["X"] * len(context))
        classifier = load(golden_base, case.info["classnames"], prompt_template=f"{template} {{}}.")
        get_peft_model(classifier, CLIPPromptTuningConfig(num_virtual_tokens=len(context)))
        vectors = classifier.text_model.embeddings.learnable_embeddings["default"]
        vectors.data.copy_(context)
        classifier.class_encoder.path, classifier.class_encoder.batch_size = path, batch_size
        outputs = classifier(pixel_values=case.pixel_values, labels=case.labels)
        outputs.loss.backward()
        torch.testing.assert_close(outputs.logits, case["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs.loss, case["loss"], rtol=0, atol=5e-5)
        assert (vectors.grad - case["grad.ctx"]).abs().max() <= 1e-4 * case["grad.ctx"].abs().max()

    @pytest.mark.parametrize("path", ["packed", "cut", "plain"])
    def test_zero_shot_logits_are_those_of_the_original_code(self, golden, golden_base, path):
        case = golden("zeroshot")
        classifier = load(golden_base, case.info["classnames"])
        classifier.class_encoder.path = path
        logits = classifier(pixel_values=case.pixel_values).logits
        torch.testing.assert_close(logits, case["logits"], rtol=0, atol=1e-4)


class TestChoiceOfPath:
    """Seen by how many rows, of which length, the text tower runs."""

    def rows_of(self, classifier):
        shapes, forward = [], CLIPEncoder.forward

        def recorded(encoder, inputs_embeds, **kwargs):
            if encoder is classifier.text_model.encoder:
                shapes.append(tuple(inputs_embeds.shape[:2]))
            return forward(encoder, inputs_embeds=inputs_embeds, **kwargs)

        with patch.object(CLIPEncoder, "forward", recorded):  # of the class: a hook would change the path
            embeds = classifier.get_class_embeds()
        return shapes[-1], embeds

    def test_by_default_the_prompts_are_packed(self):
        shape, _ = self.rows_of(load(TINY_CLIP))
        assert shape[0] == 1

    def test_plain_rows_are_as_many_as_classes_and_fill_all_positions(self):
        classifier = load(TINY_CLIP)
        classifier.class_encoder.path = "plain"
        assert self.rows_of(classifier)[0] == (len(NAMES), 77)

    def test_attention_that_takes_no_mask_of_ours_gets_cut_rows(self):
        classifier = load(TINY_CLIP, ["cat", "red car"])
        expected = classifier.get_class_embeds()
        AttentionInterface.register("of_somebody", sdpa_attention_forward)
        classifier.text_model.set_attn_implementation("of_somebody")
        (rows, length), embeds = self.rows_of(classifier)
        assert rows == 2 and length < 77
        torch.testing.assert_close(embeds, expected)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_a_tower_that_looks_ahead_gets_plain_rows(self, attention):
        classifier = load(TINY_CLIP, attn_implementation=attention)
        classifier.text_model.config.is_causal = False  # transformers then masks the padding only
        expected = classifier.get_text_features(**plain_tokens(classifier)).pooler_output
        shape, embeds = self.rows_of(classifier)
        assert shape == (len(NAMES), 77)
        torch.testing.assert_close(embeds, expected / expected.norm(dim=-1, keepdim=True))

    def test_a_path_that_is_not_exact_is_refused(self):
        classifier = load(TINY_CLIP)
        classifier.text_model.config.is_causal = False
        classifier.class_encoder.path = "packed"
        with pytest.raises(ValueError, match="'plain'"):
            classifier.get_class_embeds()

    def test_a_text_model_that_does_more_than_its_parts_gets_plain_rows(self):
        classifier = load(TINY_CLIP)
        forward = classifier.text_model.forward

        def scaled(**kwargs):
            outputs = forward(**kwargs)
            outputs.last_hidden_state = 2 * outputs.last_hidden_state
            return outputs

        classifier.text_model.forward = scaled
        expected = classifier.get_text_features(**plain_tokens(classifier)).pooler_output
        (rows, length), embeds = self.rows_of(classifier)
        assert (rows, length) == (len(NAMES), 77)
        torch.testing.assert_close(embeds, expected / expected.norm(dim=-1, keepdim=True))

    def test_the_path_is_asked_for_again_when_the_attention_changes(self):
        classifier = load(TINY_CLIP)
        assert self.rows_of(classifier)[0][0] == 1
        classifier.text_model.config.is_causal = False
        assert self.rows_of(classifier)[0] == (len(NAMES), 77)

    @pytest.mark.parametrize("place", ["text_model", "text_model.encoder.layers.1.self_attn"])
    def test_forward_hooks_get_plain_rows_for_as_long_as_they_are_there(self, place):
        classifier, seen = load(TINY_CLIP), []
        packed = classifier.get_class_embeds()
        hook = classifier.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[0]))
        shape, embeds = self.rows_of(classifier)
        assert shape == (len(NAMES), 77) and seen
        torch.testing.assert_close(embeds, packed, atol=1e-6, rtol=0)
        hook.remove()
        assert self.rows_of(classifier)[0][0] == 1

    def test_asking_for_hidden_states_leaves_the_prompts_packed(self):
        classifier = load(TINY_CLIP)
        classifier.text_model(**plain_tokens(classifier), output_hidden_states=True, output_attentions=True)
        assert self.rows_of(classifier)[0][0] == 1

    def test_a_layer_of_an_unknown_class_gets_plain_rows(self):
        class Unknown(torch.nn.LayerNorm):
            pass

        classifier = load(TINY_CLIP)
        norm = classifier.text_model.encoder.layers[0].layer_norm1
        norm.__class__ = Unknown
        assert self.rows_of(classifier)[0] == (len(NAMES), 77)

    @pytest.mark.parametrize(
        ("setting", "value"), [("path", "fast"), ("batch_size", 0), ("batch_size", "8"), ("across_processes", 2)]
    )
    def test_settings_that_do_not_exist_are_refused(self, setting, value):
        classifier = load(TINY_CLIP)
        setattr(classifier.class_encoder, setting, value)
        with pytest.raises(ValueError, match=setting):
            classifier.get_class_embeds()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_settings_survive_copying(self, copied):
        classifier = load(TINY_CLIP)
        classifier.class_encoder.batch_size = 3
        assert copied(classifier).class_encoder.batch_size == 3


class TestChunks:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    @pytest.mark.parametrize(("path", "batch_size"), [("packed", 3), ("cut", 1)])
    def test_embeddings_and_gradients_are_those_of_all_at_once(self, base, adapter, path, batch_size):
        model = ADAPTERS[adapter](load(base))
        expected = embeds_and_gradients(model, path="plain", batch_size=None)
        assert_same(embeds_and_gradients(model, path=path, batch_size=batch_size), expected)

    def test_they_are_so_with_gradient_checkpointing(self):
        model = lora_tuned(load(TINY_CLIP)).train()
        expected = embeds_and_gradients(model, path="plain", batch_size=None)
        model.gradient_checkpointing_enable()
        assert_same(embeds_and_gradients(model, batch_size=2), expected)

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_they_are_so_under_autocast(self, adapter):
        model = ADAPTERS[adapter](load(TINY_CLIP))
        with torch.autocast("cpu", torch.bfloat16):
            expected = embeds_and_gradients(model, path="cut", batch_size=None)
            results = embeds_and_gradients(model, path="cut", batch_size=3)
        assert_same(results, expected, tolerance=2**-6)

    def test_the_backward_pass_may_come_after_autocast_has_ended(self):
        model = prompt_tuned(load(TINY_CLIP))
        classifier, vectors = model.get_base_model(), next(p for p in model.parameters() if p.requires_grad)
        gradients = []
        for batch_size in (None, 3):
            classifier.class_encoder.batch_size, classifier.class_encoder.path = batch_size, "cut"
            with torch.autocast("cpu", torch.bfloat16):
                embeds = classifier.get_class_embeds()
            gradients += torch.autograd.grad(embeds[:, 0].sum(), vectors)
        assert (gradients[0] - gradients[1]).abs().max() <= 2**-6 * gradients[0].abs().max()

    def test_by_default_many_classes_are_encoded_in_chunks(self):
        model = prompt_tuned(load(TINY_CLIP, [f"cat {number}" for number in range(300)]))
        results = embeds_and_gradients(model)
        assert_same(results, embeds_and_gradients(model, batch_size=None))

    def kept_by_autograd(self, num_classes, batch_size):
        """Bytes of tensors, beside the model's own, that one step keeps for the backward pass."""
        model = prompt_tuned(load(TINY_CLIP, [f"cat {number}" for number in range(num_classes)]))
        model.get_base_model().class_encoder.batch_size = batch_size
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeds = model.get_base_model().get_class_embeds()
        assert embeds.requires_grad
        return sum(size for address, size in kept.items() if address not in weights)

    def test_what_is_kept_for_the_backward_pass_does_not_grow_with_classes(self):
        assert self.kept_by_autograd(40, 10) == self.kept_by_autograd(20, 10)
        assert self.kept_by_autograd(40, None) > 1.5 * self.kept_by_autograd(20, None)

    def test_dropout_drops_the_same_when_a_chunk_is_computed_again(self):
        weight = torch.randn(8, 4, requires_grad=True)
        chunks = torch.randn(6, 8).split(2)

        def encode(chunk):
            return torch.nn.functional.dropout(chunk, 0.5) @ weight

        gradients, following = [], []
        for together in (
            lambda: torch.cat([encode(c) for c in chunks]),
            lambda: encode_in_chunks(encode, chunks, [weight]),
        ):
            torch.manual_seed(0)
            gradients += torch.autograd.grad(together().square().sum(), weight)
            following.append(torch.rand(1))
        torch.testing.assert_close(*gradients)
        assert torch.equal(*following)  # computing again uses up no random numbers

    def test_lora_dropout_trains(self):
        model = lora_tuned(load(TINY_CLIP), dropout=0.5).train()
        results = embeds_and_gradients(model, batch_size=3)
        assert_same(embeds_and_gradients(model, batch_size=3), results)  # the same seed, the same result
        assert (results[0] - embeds_and_gradients(model.eval(), batch_size=3)[0]).abs().max() > 1e-3

    def test_weights_changed_between_forward_and_backward_are_noticed(self):
        model = prompt_tuned(load(TINY_CLIP))
        model.get_base_model().class_encoder.batch_size = 2
        embeds = model.get_base_model().get_class_embeds()
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            embeds.sum().backward()

    def test_the_backward_pass_can_be_made_again(self):
        model = prompt_tuned(load(TINY_CLIP))
        model.get_base_model().class_encoder.batch_size = 3
        loss = model.get_base_model().get_class_embeds().square().sum(dim=0).max()
        vectors = next(p for p in model.parameters() if p.requires_grad)
        gradients = [torch.autograd.grad(loss, vectors, retain_graph=True)[0] for _ in range(2)]
        torch.testing.assert_close(*gradients)

    def test_gradients_of_several_backward_passes_add_up(self, pixel_values, labels):
        model = prompt_tuned(load(TINY_CLIP))
        vectors = next(p for p in model.parameters() if p.requires_grad)
        gradients = []
        for batch_size in (None, 2):
            model.get_base_model().class_encoder.batch_size = batch_size
            vectors.grad = None
            for _ in range(2):
                model(pixel_values=pixel_values, labels=labels).loss.backward()
            gradients.append(vectors.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.slow
@needs_compile
class TestCompiled:
    def test_a_step_in_chunks_gives_the_loss_and_gradient_of_one_that_is_not(self, labels):
        torch._dynamo.reset()
        model = prompt_tuned(load(TINY_CLIP)).train()
        classifier, vectors = model.get_base_model(), next(p for p in model.parameters() if p.requires_grad)
        classifier.text_model.encoder.layers = classifier.text_model.encoder.layers[:1]  # compiling takes its time
        classifier.class_encoder.batch_size = 4
        image_embeds, results = torch.randn(3, model.config.projection_dim), []
        for run in (model, torch.compile(model, backend="aot_eager")):
            vectors.grad = None
            for _ in range(2):
                loss = run(image_embeds=image_embeds, labels=labels).loss
                loss.backward()
            results.append((loss.detach(), vectors.grad))
        torch.testing.assert_close(*results)

    def test_the_trainer_compiles_and_evaluates(self, tmp_path):
        torch._dynamo.reset()
        losses = []
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
            torch.manual_seed(0)
            model = prompt_tuned(load(TINY_CLIP))
            model.get_base_model().text_model.encoder.layers = model.get_base_model().text_model.encoder.layers[:1]
            embeds = torch.randn(6, model.config.projection_dim)
            dataset = Dataset.from_dict({"image_embeds": embeds.numpy(), "labels": list(range(6))}).with_format(
                "torch"
            )
            args = TrainingArguments(
                tmp_path, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, **compiled
            )
            trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=dataset)
            losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
