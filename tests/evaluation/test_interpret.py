"""The vocabulary words nearest to learned vectors."""

import pytest
import torch
from adapters import tuned, vectors_of
from conftest import TINY_CLIP
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.interpret import describe_words, nearest_words


@pytest.fixture
def model(classifier):
    return get_peft_model(classifier, CLIPPromptTuningConfig())


def row_of(model, tokenizer, word):
    (token_id,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return model.text_model.embeddings.token_embedding.weight[token_id].detach()


def test_before_training_the_nearest_word_is_the_one_that_is_replaced(model):
    entries = nearest_words(model, num_words=3)
    assert [entry.position for entry in entries] == [1, 2, 3, 4]
    assert [entry.words[0] for entry in entries] == [entry.replaced for entry in entries] == ["a", "photo", "of", "a"]
    assert all(entry.distances[0] == entry.replaced_distance == pytest.approx(0, abs=1e-3) for entry in entries)
    assert all(entry.note == "still nearest to the word that it replaces" for entry in entries)


def test_a_vector_moved_next_to_a_word_names_it(model, tokenizer):
    with torch.no_grad():
        vectors_of(model)[1] = row_of(model, tokenizer, "sun")
    entry = nearest_words(model)[1]
    assert entry.words[0] == "sun" and entry.distances == sorted(entry.distances) and len(entry.words) == 5
    distance = (row_of(model, tokenizer, "sun") - row_of(model, tokenizer, "photo")).norm()
    assert entry.replaced_distance == pytest.approx(float(distance), rel=1e-3)
    assert entry.note == "as near to 'sun' as words are to each other"
    assert "2, in place of 'photo': sun 0.00" in describe_words([entry])


def test_distances_are_those_of_every_word_counted_out(classifier, tokenizer):
    model = tuned(classifier)
    table = model.text_model.embeddings.token_embedding.weight.detach()
    for vector, entry in zip(vectors_of(model).detach(), nearest_words(model, num_words=4)):
        distances = (table - vector).norm(dim=-1)
        words = [tokenizer.decode([index]).strip() for index in distances.argsort().tolist()]
        kept = [(word, float(distances[index])) for word, index in zip(words, distances.argsort())]
        kept = [(word, d) for word, d in kept if "\ufffd" not in word and word not in tokenizer.all_special_tokens]
        assert entry.words == [word for word, _ in kept[:4]]
        assert entry.distances == pytest.approx([d for _, d in kept[:4]], rel=1e-3)


def test_a_vector_far_from_all_words_is_said_to_be(model):
    with torch.no_grad():
        vectors_of(model).add_(10)
    entry = nearest_words(model)[0]
    assert entry.distances[0] > entry.typical_distance > 0
    assert "say little" in entry.note


def test_any_model_with_an_adapter_will_do(tokenizer):
    model = tuned(CLIPModel.from_pretrained(TINY_CLIP), "mine", tokenizer_name_or_path=TINY_CLIP)
    assert len(nearest_words(model, tokenizer, adapter_name="mine")) == 4
    with pytest.raises(ValueError, match="pass tokenizer"):
        nearest_words(model)
    with pytest.raises(ValueError, match=r"no prompt adapter 'other'; there are \['mine'\]"):
        nearest_words(model, tokenizer, adapter_name="other")


def test_without_a_prompt_adapter_nothing_was_learned(classifier):
    with pytest.raises(ValueError, match="nothing was learned"):
        nearest_words(get_peft_model(classifier, LoraConfig(target_modules=["q_proj"])))
