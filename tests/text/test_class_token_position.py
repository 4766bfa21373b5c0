"""Class names among the vectors: which tokens they are, and where they go."""

import pytest
import torch
from conftest import CLASS_NAMES
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig, build_class_prompts
from clip_prompt_peft.text.prompts import count_name_tokens, move_class_names


IDS = torch.tensor([[0, 1, 2, 3, 4, 50, 51, 9], [0, 1, 2, 3, 4, 60, 9, 9]])  # begin, 4 of context, name, end


@pytest.mark.parametrize(
    ("num_before", "ids", "positions"),
    [
        (
            2,
            [[0, 1, 2, 50, 51, 3, 4, 9], [0, 1, 2, 60, 3, 4, 9, 9]],
            [[1, 2, 5, 6], [1, 2, 4, 5]],
        ),
        (
            0,
            [[0, 50, 51, 1, 2, 3, 4, 9], [0, 60, 1, 2, 3, 4, 9, 9]],
            [[3, 4, 5, 6], [2, 3, 4, 5]],
        ),
        (4, IDS.tolist(), [[1, 2, 3, 4], [1, 2, 3, 4]]),
    ],
    ids=["middle", "front", "end"],
)
def test_names_move_in_front_of_the_vectors_that_follow_them(num_before, ids, positions):
    moved, at = move_class_names(IDS, [2, 1], start=1, n=4, num_before=num_before)
    assert moved.tolist() == ids
    assert at.tolist() == positions


def test_words_before_the_first_vector_stay_where_they_are():
    moved, at = move_class_names(IDS, [2, 1], start=3, n=2, num_before=1)
    assert moved.tolist() == [[0, 1, 2, 3, 50, 51, 4, 9], [0, 1, 2, 3, 60, 4, 9, 9]]
    assert at.tolist() == [[3, 6], [3, 5]]


def test_a_token_that_joins_the_name_and_what_follows_is_the_names(tokenizer):
    names, template = ["cat", "what?", "red car"], "X X {}?!."
    texts = [template.format(name) for name in names]
    tokens = [tokenizer.convert_ids_to_tokens(ids)[3:-1] for ids in tokenizer(texts)["input_ids"]]
    counts = count_name_tokens(names, texts, name_at=4, first_token=3, tokenizer=tokenizer, alone=False)
    for name, row, count in zip(names, tokens, counts):
        text = "".join(row[:count]).replace("</w>", "")
        assert text.startswith(name.replace(" ", ""))  # none of its letters is left behind
        rest = "".join(row[: count - 1]).replace("</w>", "")
        assert len(rest) < len(name.replace(" ", ""))  # and no whole token too much


@pytest.mark.parametrize("position", ["middle", "front"])
def test_an_untrained_adapter_scores_the_moved_texts(classifier, pixel_values, position):
    """Starting from words, the model is the zero-shot model on the texts in their new order."""
    model = get_peft_model(classifier, CLIPPromptTuningConfig(class_token_position=position)).eval()
    moved = {"middle": "a photo {} of a.", "front": "{} a photo of a."}[position]
    class_embeds = classifier.get_class_embeds()
    prompts = build_class_prompts(CLASS_NAMES, moved, classifier.tokenizer, 77)
    with model.disable_adapter():
        features = classifier.get_text_features(prompts.input_ids, prompts.attention_mask).pooler_output
    torch.testing.assert_close(class_embeds, torch.nn.functional.normalize(features, dim=-1))


def test_changing_the_position_of_an_adapter_builds_the_prompts_anew(classifier, pixel_values):
    fields = {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"}
    model = get_peft_model(classifier, CLIPPromptTuningConfig(**fields)).eval()
    model.add_adapter("front", CLIPPromptTuningConfig(**fields, class_token_position="front"))
    vectors = classifier.text_model.embeddings.learnable_embeddings
    vectors["front"].data.copy_(vectors["default"])
    end = model(pixel_values=pixel_values).logits
    model.set_adapter("front")
    front = model(pixel_values=pixel_values).logits
    assert not torch.allclose(end, front, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(pixel_values=pixel_values).logits, end)
