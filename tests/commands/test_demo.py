"""Tests of the command `demo`: what it computes, and what the page in the browser shows."""

import re
import shutil

import pytest
import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig


pytest.importorskip("gradio")

TIMEOUT = 30_000  # milliseconds, on a busy machine
CLASSES_OF = {"first": CLASS_NAMES, "second": ["face", "hand"]}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, class_names) in enumerate(CLASSES_OF.items()):
        torch.manual_seed(seed)
        base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names)
        config = CLIPPromptTuningConfig(prompt_tuning_init="RANDOM", num_virtual_tokens=4)
        get_peft_model(base, config).save_pretrained(folder / name)
    lora = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def demo():
    from clip_prompt_peft.commands import demo

    return demo


@pytest.fixture(scope="module")
def comparison(demo, adapters):
    return demo.Comparison(TINY_CLIP, {name: str(adapters / name) for name in (*CLASSES_OF, "lora")})


def picture(color):
    image = Image.new("RGB", (64, 64), "white")
    image.paste(color, (16, 8, 40, 56))
    return image


def expected(model, image):
    pixels = AutoImageProcessor.from_pretrained(TINY_CLIP)(image, return_tensors="pt")
    classifier = getattr(model, "get_base_model", lambda: model)()
    with torch.no_grad():
        values = model.eval()(**pixels).logits[0].softmax(dim=0)
    return pytest.approx(dict(zip(classifier.class_names, values.tolist())), abs=1e-5)


def test_zero_shot_and_tuned_are_those_of_the_models(comparison, adapters):
    assert comparison.class_names == CLASSES_OF
    for name in ("second", "first", "second"):
        zero_shot, tuned = comparison(picture("red"), name, CLASSES_OF[name])
        base = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASSES_OF[name])
        assert zero_shot == expected(base, picture("red"))
        assert tuned == expected(AutoPeftModelForPromptClassification.from_pretrained(adapters / name), picture("red"))


def test_class_names_may_be_others_than_those_tuned_on(comparison, adapters):
    zero_shot, tuned = comparison(picture("red"), "first", ["ruby", "tomato", "rose"])
    model = AutoPeftModelForPromptClassification.from_pretrained(adapters / "first")
    model.get_base_model().set_class_names(["ruby", "tomato", "rose"])
    assert tuned == expected(model, picture("red"))
    assert list(zero_shot) == ["ruby", "tomato", "rose"]
    assert zero_shot != tuned
    assert comparison.class_names == CLASSES_OF
    with pytest.raises(ValueError, match="stand there twice"):
        comparison(picture("red"), "first", ["ruby", "ruby"])


def test_a_folder_without_adapters_is_refused(demo, adapters, tmp_path):
    shutil.copytree(adapters / "lora", tmp_path / "lora")
    with pytest.raises(ValueError, match="There are no adapters with class names"):
        demo.Comparison(TINY_CLIP, {"lora": str(tmp_path / "lora")})


@pytest.fixture
def page(demo, comparison):
    """The demo in a headless Chromium; one that no server but this one is asked for anything."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    app = demo.build_demo(comparison, [picture("green"), picture("blue")])
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=demo.theme())
    elsewhere = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(url)
        yield page
        browser.close()
    app.close()
    assert [address for address in elsewhere if not address.startswith((url, "data:", "blob:"))] == []


def shows(page, comparison, image, adapter, class_names):
    """Waits until the page shows the leading labels and percentages that the models give."""
    for box, probabilities in zip(("zero-shot", "tuned"), comparison(image, adapter, class_names)):
        label, value = max(probabilities.items(), key=lambda item: item[1])
        line = re.compile(rf"{re.escape(label)}\W*{100 * value:.0f}%")
        page.locator(f"#{box}", has_text=line).wait_for(timeout=TIMEOUT)


def test_a_person_sees_both_answers_side_by_side(page, comparison, tmp_path):
    shows(page, comparison, picture("green"), "first", CLASS_NAMES)  # at once, for the first example

    page.locator(".gallery-item").nth(1).click()
    shows(page, comparison, picture("blue"), "first", CLASS_NAMES)

    names = page.get_by_label("Class names, separated by commas")
    names.fill("sky, sea, berry")
    page.get_by_role("button", name="Classify").click()
    shows(page, comparison, picture("blue"), "first", ["sky", "sea", "berry"])

    page.get_by_label("Adapter").click()
    page.get_by_role("option", name="second").click()
    shows(page, comparison, picture("blue"), "second", CLASSES_OF["second"])
    assert names.input_value() == "face, hand"

    picture("orange").save(tmp_path / "orange.png")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.locator("#image input[type=file]").set_input_files(tmp_path / "orange.png")
    shows(page, comparison, picture("orange"), "second", CLASSES_OF["second"])

    names.fill("sky, sky")
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("stand there twice").first.wait_for(timeout=TIMEOUT)
