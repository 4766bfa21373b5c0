"""Prompts in a model whose embedding tables are quantized, by classes that are a `nn.Embedding` or are none."""

import pytest
import torch
from adapters import as_if_trained, layer_of, logits_of
from cases import new_classifier
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import embedding

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.interpret import nearest_words


DEEP = {"num_virtual_tokens": 2, "text_prompt_depth": 2, "num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}


def in_int8(table):
    scale = table.weight.detach().abs().amax(1, keepdim=True) / 127
    return (table.weight.detach() / scale).round().to(torch.int8), scale


class Int8Embedding(nn.Embedding):
    """As in bitsandbytes: an embedding whose weight has another type."""

    def __init__(self, table):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = *table.weight.shape, table.padding_idx
        weight, scale = in_int8(table)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, token_ids):
        return embedding(token_ids, self.weight).float() * embedding(token_ids, self.scale)


class PackedEmbedding(nn.Module):
    """A class of its own, without a weight."""

    def __init__(self, table):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.weight.shape
        weight, scale = in_int8(table)
        self.register_buffer("packed", torch.cat([weight.view(torch.uint8), scale.view(torch.uint8)], dim=1))

    def forward(self, token_ids):
        rows = embedding(token_ids, self.packed)
        return rows[..., :-4].contiguous().view(torch.int8).float() * rows[..., -4:].contiguous().view(torch.float32)


@pytest.fixture(params=[Int8Embedding, PackedEmbedding])
def quantized(request):
    def make(*names):
        classifier = new_classifier().requires_grad_(False)
        for name in names or ("token_embedding",):
            embeddings = classifier.text_model.embeddings
            setattr(embeddings, name, request.param(getattr(embeddings, name)))
        return classifier

    return make


def test_the_untrained_adapter_is_the_zero_shot_model(quantized, pixel_values):
    model = get_peft_model(quantized(), CLIPPromptTuningConfig()).eval()
    torch.testing.assert_close(logits_of(model, pixel_values), logits_of(quantized(), pixel_values))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("fields", [{}, {"image_conditioned": True}, DEEP], ids=["text", "image_conditioned", "deep"])
def test_vectors_are_floating_point_numbers_that_are_trained_saved_and_loaded(
    quantized, fields, autocast_adapter_dtype, pixel_values, labels, tmp_path
):
    config = CLIPPromptTuningConfig(**fields, prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(quantized(), config, autocast_adapter_dtype=autocast_adapter_dtype).train()
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(p.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in trained if p.ndim > 1)
    as_if_trained(model.eval()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(logits_of(loaded, pixel_values), logits_of(model, pixel_values))


def test_vectors_are_merged_into_a_position_table_that_is_not_quantized(quantized, pixel_values):
    model = as_if_trained(get_peft_model(quantized(), CLIPPromptTuningConfig()).eval())
    expected = logits_of(model, pixel_values)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), pixel_values), expected, rtol=1e-3, atol=1e-3)


def test_vectors_are_not_merged_into_a_quantized_position_table():
    classifier = new_classifier()
    embeddings = classifier.text_model.embeddings
    embeddings.position_embedding = Int8Embedding(embeddings.position_embedding)
    model = get_peft_model(classifier, CLIPPromptTuningConfig())
    before = embeddings.position_embedding.weight.clone()
    with pytest.raises(ValueError, match="position table is quantized"):
        model.merge_adapter()
    assert torch.equal(embeddings.position_embedding.weight, before) and not layer_of(model).merged


def test_the_words_next_to_untrained_vectors_are_the_replaced_ones(quantized, tokenizer):
    model = get_peft_model(quantized(), CLIPPromptTuningConfig())
    for entry in nearest_words(model, tokenizer):
        assert entry.words[0] == entry.replaced and entry.distances[0] == pytest.approx(0, abs=1e-3)
