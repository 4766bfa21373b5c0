"""Class names and templates become token ids."""

import pytest
from conftest import CLASS_NAMES, TINY_CLIP

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, build_class_prompts, pad_template


MAX_LENGTH = 77


def build(class_names, template="a photo of a {}.", tokenizer=None, layout=None):
    return build_class_prompts(class_names, template, tokenizer, MAX_LENGTH, layout)


def layout(tokenizer, **fields):
    """The layout that a filled-in configuration has, written by hand."""
    context = tokenizer(fields["padded_template"].split("{}")[0].strip(), add_special_tokens=False)["input_ids"]
    start, n = fields.setdefault("start_idx", 1), fields["num_virtual_tokens"]
    return CLIPPromptTuningConfig(replaced_token_ids=context[start - 1 : start - 1 + n], **fields)


def test_every_name_is_written_into_the_template(tokenizer):
    prompts = build(["cat", "fire truck"], "art of a {}, drawn", tokenizer)
    assert prompts.texts == ["art of a cat, drawn", "art of a fire truck, drawn"]


def test_ids_are_those_of_the_tokenizer_and_end_with_the_longest_prompt(tokenizer):
    prompts = build(["cat", "fire truck"], tokenizer=tokenizer)
    single = [tokenizer(text)["input_ids"] for text in prompts.texts]
    lengths = [len(ids) for ids in single]
    assert prompts.input_ids.shape == prompts.attention_mask.shape == (2, max(lengths))
    assert prompts.attention_mask.sum(dim=1).tolist() == lengths
    for ids, row, length in zip(single, prompts.input_ids, lengths):
        assert row[:length].tolist() == ids


def test_a_name_with_braces_is_taken_literally(tokenizer):
    assert build(["a {} b", "c"], tokenizer=tokenizer).texts[0] == "a photo of a a {} b."


def test_braces_other_than_the_slot_are_part_of_the_template(tokenizer):
    assert build(["cat"], "a {large} {}.", tokenizer).texts == ["a {large} cat."]


@pytest.mark.parametrize(
    "class_names, message",
    [
        ([], "class_names is empty"),
        ("cat", "must be a list of strings in the order of the labels, got 'cat'"),
        (3, "must be a list of strings in the order of the labels, got 3"),
        ({"cat"}, "in the order of the labels"),
        ({"cat": 0}, "in the order of the labels"),
        (["cat", ""], r"class_names\[1\] is empty"),
        (["cat", " \t"], r"class_names\[1\] is empty"),
        (["cat", 7], r"class_names\[1\] is 7 of type int"),
        (["cat", None], r"class_names\[1\] is None of type NoneType"),
        (["cat", "dog", "cat"], r"stand there twice: \['cat'\]"),
    ],
)
def test_bad_class_names_are_refused_by_what_is_wrong_with_them(tokenizer, class_names, message):
    with pytest.raises(ValueError, match=message):
        build(class_names, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "template, message",
    [
        ("a photo of a cat.", "holds {} 0 times"),
        ("a {} of a {}.", "holds {} 2 times"),
        ("a photo of a {name}.", "holds {} 0 times"),
        ("", "holds {} 0 times"),
        (None, "must be a string"),
        (["a {}"], "must be a string"),
    ],
)
def test_a_template_holds_the_class_slot_exactly_once(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        build(["cat"], template, tokenizer)


def test_a_prompt_that_is_too_long_is_refused_with_its_class_named(tokenizer):
    with pytest.raises(ValueError, match="class name 'cat cat .*makes 87 tokens.* 77 positions"):
        build(["dog", " ".join(["cat"] * 80)], tokenizer=tokenizer)  # begin, 4 words, 80 cats, full stop, end


def test_a_prompt_that_fills_all_positions_is_accepted(tokenizer):
    assert build([" ".join(["cat"] * 70)], tokenizer=tokenizer).input_ids.shape == (1, 77)


def test_the_layout_brings_its_own_template(tokenizer):
    padded = layout(tokenizer, padded_template="X X a photo of a {}.", num_virtual_tokens=6)
    assert build(["cat"], tokenizer=tokenizer, layout=padded).texts == ["X X a photo of a cat."]


def test_a_name_that_merges_with_the_context_is_refused(tokenizer):
    glued = layout(tokenizer, padded_template="a photo{}.", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="The prompt 'a photograph.' does not have the tokens .* must not merge"):
        build([" cat", "graph"], tokenizer=tokenizer, layout=glued)


def test_replaced_positions_behind_the_text_are_refused(tokenizer):
    # written by hand: positions 3 ... 9 do not exist in "a cat."
    beyond = CLIPPromptTuningConfig(
        padded_template="a {}.", num_virtual_tokens=7, start_idx=3, replaced_token_ids=[343] * 7
    )
    with pytest.raises(ValueError, match="The prompt 'a cat.' does not have the tokens .* at positions 3 ... 9"):
        build(["cat"], tokenizer=tokenizer, layout=beyond)


@pytest.mark.parametrize(
    "template, num_virtual_tokens, start_idx, padded",
    [
        ("a photo of a {}.", 3, 1, "a photo of a {}."),
        ("a photo of a {}.", 4, 1, "a photo of a {}."),
        ("a photo of a {}.", 6, 1, "X X a photo of a {}."),
        ("a photo of a {}.", 5, 2, "a X X photo of a {}."),
        ("a photo of a {}.", 2, 5, "a photo of a X X {}."),
        ("{}.", 4, 1, "X X X X {}."),
        ("{}", 1, 1, "X {}"),
        ("photo-{}", 4, 1, "X X photo-{}"),
        ("photo-{}", 2, 3, "photo- X X {}"),
    ],
)
def test_placeholders_make_room_at_the_first_replaced_position(
    tokenizer, template, num_virtual_tokens, start_idx, padded
):
    assert pad_template(template, num_virtual_tokens, tokenizer, start_idx) == padded
    words = tokenizer(padded.split("{}")[0].strip(), add_special_tokens=False)["input_ids"]
    assert len(words) >= start_idx - 1 + num_virtual_tokens


def test_placeholders_are_not_put_inside_a_word(tokenizer):
    assert len(tokenizer.tokenize("photograph")) > 1
    with pytest.raises(ValueError, match="start_idx=2 is not the beginning of a word of 'photograph of'"):
        pad_template("photograph of {}", 9, tokenizer, start_idx=2)


def test_a_tokenizer_that_cuts_the_placeholder_is_refused():
    def letters(text, add_special_tokens=True):
        return {"input_ids": [ord(char) for char in text + "_"]}

    with pytest.raises(ValueError, match="does not read the placeholder 'X' as one token"):
        pad_template("{}", 4, letters)


def test_the_classifier_names_the_class_that_is_too_long_and_keeps_its_classes(classifier):
    with pytest.raises(ValueError, match="class name 'cat cat .* 77 positions"):
        classifier.set_class_names(["dog", " ".join(["cat"] * 80)])
    assert classifier.class_names == CLASS_NAMES


def test_bad_class_names_are_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="stand there twice"):
        CLIPForPromptClassification.from_pretrained("no/such-model", class_names=["a", "a"])
    with pytest.raises(ValueError, match="holds {} 0 times"):
        CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["a"], prompt_template="a photo")


@pytest.mark.parametrize("name", ["cat<|endoftext|>", "<|startoftext|> cat"])
def test_a_name_that_spells_out_a_special_token_is_refused(tokenizer, name):
    with pytest.raises(ValueError, match="has 3 special tokens"):
        build_class_prompts(["dog", name], "a photo of a {}.", tokenizer, max_length=77)
