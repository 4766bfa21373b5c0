"""The model card that is saved with an adapter."""

import re

import pytest
from conftest import ROOT, TINY_CLIP
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.evaluation.model_card import is_hub_id


def squeezed(text):
    """The text without the padding of its tables."""
    return re.sub(" +", " ", text)


@pytest.fixture
def card_for(tmp_path):
    """Saves an adapter and loads its card."""

    def card_for(class_names=("cat", "dog"), base="openai/clip-vit-base-patch16", metrics=None, **config):
        classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names)
        model = get_peft_model(classifier, CLIPPromptTuningConfig(**config))
        model.active_peft_config.base_model_name_or_path = base
        model.card_metrics = metrics
        model.save_pretrained(tmp_path)
        return ModelCard.load(tmp_path / "README.md")

    return card_for


def test_names_base_model_template_vectors_classes_and_metrics(card_for):
    metrics = {"accuracy": 0.12345, "class_mean": 1}
    text = squeezed(card_for(metrics=metrics, num_virtual_tokens=6, prompt_tuning_init="RANDOM").text)
    for said in (
        "- Base model: `openai/clip-vit-base-patch16`\n",
        "- Vectors: 6, replacing the tokens from position 1\n",
        "- Template: `X X a photo of a {}.`\n",
        "- Initialized from: RANDOM\n",
        "- Classes (2): `cat`, `dog`\n",
        "| `accuracy` | 0.1235 |\n",
        "| `class_mean` | 1 |\n",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("coop-csc", ["Vectors: 16, replacing the tokens from position 1; separate ones for each class"]),
        ("cocoop", ["Vectors: 4, .* shifted by a small network that reads the image embedding"]),
        ("vpt-deep", ["Vectors: none in the text", "Vision prompts: 8 after the image patches, in 4 layers"]),
        (
            "maple",
            [
                "Vectors: 2, .* new ones in each of the first 3 layers",
                "Vision prompts: 2 after the image patches, in 3 layers, linear maps of the text vectors",
            ],
        ),
        ("kgcoop", ["Trained with the regularizer: kgcoop"]),
    ],
)
def test_says_what_kind_of_prompts_they_are(classifier, tmp_path, preset, said):
    get_peft_model(classifier, CLIPPromptTuningConfig.from_preset(preset, model=classifier)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for line in said:
        assert re.search(f"- {line}", text), text


def test_snippet_imports_this_package_and_is_python(card_for):
    snippet = card_for().text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert "from clip_prompt_peft import AutoPeftModelForPromptClassification" in snippet


def test_metadata_can_be_found_on_the_hub(card_for):
    data = card_for().data
    assert data.get("library_name") == "peft" and data.pipeline_tag == "image-classification"
    assert data.base_model == "openai/clip-vit-base-patch16"
    assert {"clip", "prompt-tuning", "base_model:adapter:openai/clip-vit-base-patch16"} <= set(data.tags)
    assert not [tag for tag in data.tags if str(ROOT) in tag]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (TINY_CLIP, "`tiny_clip`, a folder (not on"),
        ("/gone/some clip/", "`some clip`, a folder (not on"),
        ("", "unknown (not on"),
    ],
)
def test_a_base_model_that_is_not_on_the_hub_is_no_metadata_and_its_path_stays_private(card_for, base, said):
    card = card_for(base=base)
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
    assert f"Base model: {said}" in card.text and "pass `base_model_name_or_path`" in card.text
    assert not base or base not in str(card)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>", "`<script>alert(1)</script>`"),
        ("[free](https://evil.example)", "`[free](https://evil.example)`"),
        ("snake_case *star*", "`snake_case *star*`"),
        ("two\nlines\r\n---\t# heading", "`two lines  --- # heading`"),
        ("left\u202eright\x00\x1b[31m", "`left right  [31m`"),
        ("`", "`` ` ``"),
        ("a`b``c", "```a`b``c```"),
        ("Käse 🧀", "`Käse 🧀`"),
    ],
)
def test_class_names_are_shown_as_they_are_and_are_never_markup(card_for, name, shown):
    assert f"- Classes (2): {shown}, `plain`\n" in card_for(class_names=[name, "plain"]).text


def test_a_bar_in_the_name_of_a_metric_does_not_end_the_cell(card_for):
    assert "| `accuracy \\| noto` | 0.5 |\n" in squeezed(card_for(metrics={"accuracy | noto": 0.5}).text)


def test_long_lists_of_classes_are_cut(card_for):
    text = card_for(class_names=[f"class {i}" for i in range(60)]).text
    assert "- Classes (60): `class 0`" in text and "`class 49`, ... (10 more)\n" in text and "class 50" not in text


def test_saving_again_replaces_the_section_and_keeps_the_rest(card_for, tmp_path):
    card = card_for(class_names=["<!-- clip_prompt_peft: end -->", "dog"])
    card.text += "\nA remark of the author.\n"
    card.data.license, card.data.tags = "mit", [*card.data.tags, "mine"]
    card.save(tmp_path / "README.md")
    again = card_for(class_names=["heart", "arrow"])
    assert again.text.count("## Learned prompts for CLIP") == 1
    assert "`heart`, `arrow`" in again.text and "dog" not in again.text
    assert "A remark of the author." in again.text
    assert again.data.license == "mit" and "mine" in again.data.tags
    assert len(again.data.tags) == len(set(again.data.tags))


def test_an_adapter_without_class_names_has_a_card_too(tmp_path):
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CLIPPromptTuningConfig())
    model.save_pretrained(tmp_path)
    assert "- Classes (0): none saved\n" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_saving_asks_nobody_for_the_base_model(card_for):
    assert "gone" in card_for(base="gone/clip").text


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/clip-vit-base-patch16", True),
        ("gpt2", True),
        (TINY_CLIP, False),
        ("/no/such/folder", False),
        ("./here", False),
        ("a/b/c", False),
        ("C:\\models\\clip", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_ids_are_told_from_paths(name, is_id):
    assert is_hub_id(name) is is_id


def test_a_folder_with_a_name_like_an_id_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("outputs/clip")
    (tmp_path / "outputs" / "clip").mkdir(parents=True)
    assert not is_hub_id("outputs/clip")
