"""The HTML report."""

import re
import sys
from html.parser import HTMLParser

import pytest
from adapters import tuned
from conftest import EMOJI, TINY_CLIP
from transformers import AutoImageProcessor

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.data import class_names_of, load_image_dataset
from clip_prompt_peft.evaluation.comparison import compare_with_zero_shot
from clip_prompt_peft.evaluation.report import write_report


class Page(HTMLParser):
    """Collects the addresses, the text and the tags that are not closed."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def parts():
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"].select(range(0, 200, 8))
    names = class_names_of(dataset)
    model = tuned(CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=names))
    return model, compare_with_zero_shot(model, dataset, AutoImageProcessor.from_pretrained(TINY_CLIP)), dataset


@pytest.mark.slow
def test_shows_numbers_words_and_pictures_and_needs_no_other_file(parts, tmp_path):
    model, comparison, dataset = parts
    write_report(tmp_path / "report.html", model, comparison, dataset, "My <prompts>", {"Tuned on": "<b>pets</b>"})
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open
    assert len(page.addresses) >= 7 and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "My <prompts>" in page.text and "<b>pets</b>" in page.text  # shown literally, not as markup
    accuracy = comparison.tuned.metrics["accuracy"]
    row = rf"accuracy{100 * comparison.zero_shot.metrics['accuracy']:.1f} %{100 * accuracy:.1f} %"
    assert re.search(row.replace(".", r"\."), page.text)
    assert "a photo of a {}." in page.text and "Vocabulary words nearest to the learned vectors" in page.text
    if len(comparison.lost):
        assert f"Only correct zero-shot: {len(comparison.lost)} images" in page.text
    assert f"Still wrong when tuned, the most confident first: {len(comparison.wrong)} images" in page.text
    true, predicted, count, indices = comparison.confused_pairs()[0]
    assert f"{true}, taken for {predicted}: {len(indices)} of {count} image" in page.text
    assert "transformers" in page.text


@pytest.mark.slow
def test_more_images_than_are_shown_are_counted(parts, tmp_path, monkeypatch):
    model, comparison, dataset = parts
    monkeypatch.setattr("clip_prompt_peft.evaluation.report.MAX_IMAGES", 1)
    write_report(tmp_path / "report.html", model, comparison, dataset, "title")
    text = Page((tmp_path / "report.html").read_text()).text
    assert f"{len(comparison.wrong)} images, of which 1 are shown" in text


def test_without_jinja2_it_is_told_how_to_get_it(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'A report needs jinja2; pip install .*"jinja2>='):
        write_report(tmp_path / "report.html", *parts, "title")


@pytest.mark.slow
def test_the_example_writes_a_report_on_an_adapter(parts, run_here, tmp_path):
    model, _, _ = parts
    model.save_pretrained(tmp_path / "adapter")
    printed = run_here("report", "adapter", "--style", "noto", "--output", "mine.html")
    assert "tuned: accuracy" in printed and "in place of 'photo'" in printed
    assert "<td>noto</td>" in (tmp_path / "mine.html").read_text()
    with pytest.raises(
        SystemExit,
        match="clip-prompt report: error: There is no --split 'val' in the data; there are noto, fluenthc, fluent3d",
    ):
        run_here("report", "adapter", "--style", "noto", "--split", "val")
