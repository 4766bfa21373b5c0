"""Hostile class names and titles are shown literally on cards, reports and plots and in terminals."""

import re

import pytest
import torch
from adapters import tuned
from conftest import CLASS_NAMES, EMOJI, TINY_CLIP
from huggingface_hub import ModelCard

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification
from clip_prompt_peft.data import load_image_dataset
from clip_prompt_peft.templates import check_class_names, check_template


NAMES = [
    "cat\x1b[31m\x07",  # colors a terminal, and rings
    "\u202egod\u2066",  # turns the direction of writing around
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "a | b\n\n# heading\n---\nlicense: mit",
    "![x](http://evil.example/x.png)",
    "$\\frac{1}{$",
    "$x^2$ \\$5",
    "`code``",
    "{}",
    "{0.__class__}",
    "x\x00y",
]
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def model():
    return tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=NAMES))


def test_they_classify_and_come_back_as_they_are(model, tmp_path, pixel_values):
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForPromptClassification.from_pretrained(tmp_path).eval()
    assert again.class_names == NAMES
    with torch.no_grad():
        logits = again(pixel_values=pixel_values).logits
        assert logits.isfinite().all() and torch.equal(logits, model(pixel_values=pixel_values).logits)


def test_a_card_shows_them_as_code_and_nothing_else_changes(model, tmp_path):
    model.card_metrics = dict.fromkeys(NAMES, 0.5)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and not INVISIBLE.search(card.content)
    outside_of_code = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", card.text)
    assert not any(part in outside_of_code for part in ("<script", "http://evil", "license"))
    assert "\n# heading" not in card.text and "{{ 7 * 7 }}" in card.text


@pytest.mark.slow
def test_a_report_shows_them_as_text(model, tmp_path):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    from clip_prompt_peft.evaluation.comparison import Answers, Comparison
    from clip_prompt_peft.evaluation.report import write_report

    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(40))
    labels = torch.tensor(dataset["label"]).numpy()
    answers = [Answers(torch.randn(40, len(NAMES)).numpy(), labels) for _ in range(2)]
    comparison = Comparison(NAMES, *answers)
    write_report(tmp_path / "report.html", model, comparison, dataset, NAMES[2], {NAMES[3]: NAMES[1]})
    html = (tmp_path / "report.html").read_text()
    assert not INVISIBLE.search(html) and "<script" not in html and "alert(1)" in html
    assert "{{ 7 * 7 }}" in html and "<h1>heading" not in html


def test_a_terminal_gets_one_line_for_each_row(monkeypatch):
    monkeypatch.syspath_prepend(str(EMOJI.parent.parent))
    from clip_prompt_peft.evaluation.tables import aligned

    lines = aligned([["image", "label"], *([name, name] for name in NAMES)])
    assert len(lines.splitlines()) == 2 + len(NAMES) and not INVISIBLE.search(lines)


@pytest.mark.parametrize("text", ["\ud800", "cat \udc80", "\udfff {}"])
def test_half_of_a_character_is_no_text(text):
    with pytest.raises(ValueError, match=r"class_names\[1\] is .*, which is no text: the character at \d is half"):
        check_class_names(["dog", text])
    with pytest.raises(ValueError, match="The prompt template is .*, which is no text"):
        check_template(text)


def test_a_hundred_thousand_of_them_are_as_good_as_any(classifier, tmp_path):
    names = [f"class number {index}" for index in range(100_000)]
    assert check_class_names(names) == names
    model = tuned(classifier)
    model.active_peft_config.class_names = names
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").stat().st_size < 10_000  # the first of them
    with pytest.raises(ValueError, match="stand there twice"):
        check_class_names([*names, names[0]])


def test_ones_that_cannot_be_prompts_are_refused_and_change_nothing(classifier):
    for names in (["<|endoftext|>"], ["cat " * 100], [""], ["cat", "cat"], "cat", [None], []):
        with pytest.raises(ValueError):
            classifier.set_class_names(names)
    assert classifier.class_names == CLASS_NAMES
