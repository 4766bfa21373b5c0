"""The wrapped text embeddings: which values stand where."""

import pytest
import torch
from conftest import TINY_CLIP
from peft import get_peft_model
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from clip_prompt_peft import CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings


TEXTS = ["a photo of a cat.", "a photo of a fire truck."]


@pytest.fixture
def input_ids(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]  # (2, 9)


def wrap(clip, randomize=True, **fields):
    """Injects an adapter and returns its layer and the (random) vectors in it."""
    model = get_peft_model(clip, CLIPPromptTuningConfig(**fields))
    layer = model.base_model.model.text_model.embeddings
    if randomize:
        torch.nn.init.normal_(layer.learnable_embeddings["default"])
    return layer, layer.learnable_embeddings["default"]


def test_the_text_embeddings_are_wrapped_and_nothing_else(clip):
    layer, _ = wrap(clip)
    assert isinstance(layer, CLIPTextLearnableEmbeddings)
    assert isinstance(layer.get_base_layer(), CLIPTextEmbeddings)
    assert [module for module in clip.modules() if isinstance(module, CLIPTextLearnableEmbeddings)] == [layer]


@pytest.mark.parametrize("start_idx, n", [(1, 4), (1, 2), (2, 3), (3, 1)])
def test_replaced_positions_hold_the_vectors_plus_position_embeddings(clip, input_ids, start_idx, n):
    layer, vectors = wrap(clip, start_idx=start_idx, num_virtual_tokens=n)
    output = layer(input_ids)  # (2, L, D)
    positions = layer.position_embedding.weight[start_idx : start_idx + n]
    assert vectors.shape == (n, clip.config.text_config.hidden_size)
    for row in output:
        assert torch.equal(row[start_idx : start_idx + n], vectors + positions)


@pytest.mark.parametrize("start_idx, n", [(1, 4), (1, 2), (2, 3), (3, 1)])
def test_all_other_positions_are_bit_identical_to_the_base_model(clip, input_ids, start_idx, n):
    base = clip.text_model.embeddings(input_ids)
    layer, _ = wrap(clip, start_idx=start_idx, num_virtual_tokens=n)
    same = (layer(input_ids) == base).all(dim=-1).all(dim=0)  # (L,)
    replaced = torch.zeros_like(same)
    replaced[start_idx : start_idx + n] = True
    assert torch.equal(same, ~replaced)


def test_embeddings_may_be_given_instead_of_ids(clip, input_ids):
    layer, _ = wrap(clip)
    assert torch.equal(layer(inputs_embeds=layer.token_embedding(input_ids)), layer(input_ids))


def test_given_embeddings_are_not_changed_in_place(clip, input_ids):
    layer, _ = wrap(clip)
    inputs_embeds = layer.token_embedding(input_ids)
    before = inputs_embeds.clone()
    layer(inputs_embeds=inputs_embeds)
    assert torch.equal(inputs_embeds, before)


def test_given_position_ids_choose_the_position_embeddings(clip, input_ids):
    layer, vectors = wrap(clip, num_virtual_tokens=2)
    position_ids = torch.arange(input_ids.shape[1]).flip(0)[None]  # (1, L)
    output = layer(input_ids, position_ids=position_ids)
    positions = layer.position_embedding(position_ids[0, 1:3])
    assert torch.equal(output[0, 1:3], vectors + positions)


def test_a_start_from_the_replaced_words_is_the_base_model_exactly(clip, tokenizer):
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    base = clip.get_text_features(**encoded).pooler_output
    wrap(clip, randomize=False)
    assert torch.equal(clip.get_text_features(**encoded).pooler_output, base)


def test_a_start_from_placeholders_is_the_base_model_on_the_padded_texts_exactly(clip, tokenizer):
    encoded = tokenizer("X X a photo of a cat.", return_tensors="pt")
    base = clip.get_text_features(**encoded).pooler_output
    layer, vectors = wrap(clip, randomize=False, num_virtual_tokens=6)
    assert torch.equal(vectors, layer.token_embedding.weight[encoded["input_ids"][0, 1:7]])
    assert torch.equal(clip.get_text_features(**encoded).pooler_output, base)


def test_placeholders_stand_at_the_first_replaced_position(clip, tokenizer):
    layer, vectors = wrap(clip, randomize=False, num_virtual_tokens=5, start_idx=2)
    assert layer.prompt_layout.padded_template == "a X X photo of a {}."
    ids = tokenizer("a X X photo of a cat.", return_tensors="pt")["input_ids"][0]
    assert torch.equal(vectors, layer.token_embedding.weight[ids[2:7]])


def test_an_init_text_gives_the_values_and_not_the_replaced_words(clip, tokenizer):
    layer, vectors = wrap(clip, randomize=False, prompt_tuning_init_text="a drawing of the")
    ids = tokenizer("a drawing of the", add_special_tokens=False)["input_ids"]
    replaced = tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    assert torch.equal(vectors, layer.token_embedding.weight[ids])
    assert layer.prompt_layout.replaced_token_ids == replaced


def test_an_init_text_with_another_number_of_tokens_is_refused_before_anything_changes(clip):
    with pytest.raises(ValueError, match="'a drawing of' has 3 tokens, but num_virtual_tokens=4; they must be equal"):
        get_peft_model(clip, CLIPPromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init_text="a drawing of"))
    assert isinstance(clip.text_model.embeddings, CLIPTextEmbeddings)


def test_random_vectors_have_the_standard_deviation_of_coop(clip):
    _, vectors = wrap(clip, randomize=False, prompt_tuning_init="RANDOM", num_virtual_tokens=60)
    assert vectors.std().item() == pytest.approx(0.02, rel=0.05)  # 7680 values: 1 % is one standard error
    assert vectors.mean().abs().item() < 0.001
    assert vectors.unique(dim=0).shape[0] == 60


def test_sampled_vectors_are_rows_of_the_vocabulary(clip):
    layer, vectors = wrap(clip, randomize=False, prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=10)
    is_row = (vectors[:, None] == layer.token_embedding.weight).all(dim=-1)  # (n, V)
    assert is_row.any(dim=1).all()
    assert is_row.any(dim=0).sum() > 5  # not one and the same row


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_a_random_start_follows_the_seed(init):
    starts = []
    for seed in (1, 1, 2):
        clip = CLIPModel.from_pretrained(TINY_CLIP)
        torch.manual_seed(seed)
        starts.append(wrap(clip, randomize=False, prompt_tuning_init=init)[1])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_new_adapter_that_is_made_frozen_starts_as_asked(clip):
    layer, vectors = wrap(clip, randomize=False, inference_mode=True, prompt_tuning_init="RANDOM")
    assert not torch.equal(vectors, layer.token_embedding.weight[layer.prompt_layout.replaced_token_ids])
    assert not vectors.requires_grad


@pytest.mark.parametrize("length", [1, 4, 5])
def test_texts_that_end_at_the_replaced_positions_are_refused(clip, input_ids, length):
    layer, _ = wrap(clip)  # positions 1 ... 4, so at least one more is needed
    with pytest.raises(ValueError, match=f"positions 1 ... 4 and needs an end token .* only {length} tokens"):
        layer(input_ids[:, :length])
    assert layer(input_ids[:, :6]).shape[1] == 6


@pytest.mark.parametrize("fields", [{"num_virtual_tokens": 75}, {"num_virtual_tokens": 4, "start_idx": 72}])
def test_vectors_that_leave_no_room_for_class_and_end_token_are_refused(clip, fields):
    fields["prompt_template"] = "a " * 75 + "{}"
    with pytest.raises(ValueError, match="reach position 75, but the text tower has 77 positions"):
        get_peft_model(clip, CLIPPromptTuningConfig(**fields))
    assert isinstance(clip.text_model.embeddings, CLIPTextEmbeddings)


def test_a_template_without_words_needs_a_number_of_vectors(clip):
    with pytest.raises(ValueError, match="no words from position 1 up to the class name.*give num_virtual_tokens"):
        get_peft_model(clip, CLIPPromptTuningConfig(prompt_template="{}."))
    assert wrap(clip, prompt_template="{}.", num_virtual_tokens=4)[0].prompt_layout.padded_template == "X X X X {}."


def two_adapters(clip, first, second):
    model = get_peft_model(clip, CLIPPromptTuningConfig(**first), adapter_name="first")
    model.add_adapter("second", CLIPPromptTuningConfig(**second))
    layer = clip.text_model.embeddings
    for vectors in layer.learnable_embeddings.values():
        torch.nn.init.normal_(vectors)
    model.base_model.set_adapter(["first", "second"])
    return layer


def test_two_active_adapters_at_separate_positions_both_take_effect(clip, input_ids):
    base = clip.text_model.embeddings(input_ids)
    layer = two_adapters(clip, {"num_virtual_tokens": 2}, {"num_virtual_tokens": 2, "start_idx": 3})
    output = layer(input_ids)
    positions = layer.position_embedding.weight
    assert torch.equal(output[0, 1:3], layer.learnable_embeddings["first"] + positions[1:3])
    assert torch.equal(output[0, 3:5], layer.learnable_embeddings["second"] + positions[3:5])
    assert torch.equal(output[:, 5:], base[:, 5:])
    assert layer.prompt_layout.padded_template == "a photo of a {}."


def test_two_active_adapters_at_the_same_position_are_refused(clip, input_ids):
    layer = two_adapters(clip, {"num_virtual_tokens": 2}, {"num_virtual_tokens": 2, "start_idx": 2})
    with pytest.raises(ValueError, match="Adapters 'first' and 'second' both replace position 2; make only one"):
        layer(input_ids)


def test_two_active_adapters_with_different_templates_have_no_common_layout(clip):
    layer = two_adapters(
        clip, {"num_virtual_tokens": 2}, {"num_virtual_tokens": 2, "start_idx": 3, "prompt_template": "art of a {}."}
    )
    with pytest.raises(ValueError, match="different templates .*'a photo of a {}.'.*activate one of them only"):
        layer.prompt_layout  # noqa: B018


def test_there_is_a_layout_only_while_an_adapter_is_in_effect(clip):
    layer, _ = wrap(clip)
    assert layer.prompt_layout.class_names is None
    layer.enable_adapters(False)
    assert layer.prompt_layout is None
    layer.enable_adapters(True)
    assert layer.prompt_layout.num_virtual_tokens == 4


def test_the_frozen_tables_are_the_very_same_memory(clip):
    embeddings = clip.text_model.embeddings
    before = [embeddings.token_embedding.weight.data_ptr(), embeddings.position_embedding.weight.data_ptr()]
    layer, _ = wrap(clip)
    assert [layer.token_embedding.weight.data_ptr(), layer.position_embedding.weight.data_ptr()] == before
    assert layer.get_base_layer() is embeddings


def test_a_table_set_on_the_wrapper_reaches_the_wrapped_module(clip):
    layer, _ = wrap(clip)
    new = torch.nn.Embedding.from_pretrained(layer.token_embedding.weight.detach().clone())
    layer.token_embedding = new
    assert layer.get_base_layer().token_embedding is new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_stay_in_float32_over_a_base_in_half_precision(dtype, tokenizer):
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    base = clip.get_text_features(**encoded).pooler_output
    layer, vectors = wrap(clip, randomize=False)
    output = clip.get_text_features(**encoded).pooler_output
    output.float().sum().backward()
    assert vectors.dtype == vectors.grad.dtype == torch.float32
    assert layer.token_embedding.weight.dtype == output.dtype == dtype
    assert torch.equal(output, base)


def test_vectors_that_transformers_adds_are_in_float32_too():
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.bfloat16)
    clip.add_adapter(CLIPPromptTuningConfig())
    assert clip.text_model.embeddings.learnable_embeddings["default"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_take_the_dtype_of_the_base_if_peft_is_asked_not_to_cast(dtype, input_ids):
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype)
    model = get_peft_model(clip, CLIPPromptTuningConfig(), autocast_adapter_dtype=False)
    layer = clip.text_model.embeddings
    assert layer.learnable_embeddings["default"].dtype == dtype
    assert layer(input_ids).dtype == dtype
    assert model.get_layer_status()[0].requires_grad == {"default": True}


def test_the_vectors_get_the_gradient_of_every_text(clip, input_ids):
    layer, vectors = wrap(clip)
    layer(input_ids).sum().backward()
    assert torch.equal(vectors.grad, torch.full_like(vectors, len(TEXTS)))
    assert layer.token_embedding.weight.grad is None
    assert layer.position_embedding.weight.grad is None
