"""The list of known checkpoints: well-formed, equal to the table in the docs, and its configs fit their classes."""

import json
import re

import pytest
import torch
from conftest import ROOT
from huggingface_hub.utils import validate_repo_id

from clip_prompt_peft import AutoModelForPromptClassification, known_checkpoints, method_config
from clip_prompt_peft.assets import ASSETS
from clip_prompt_peft.families import CLASSIFIERS
from clip_prompt_peft.known_checkpoints import CONFIG, LOADED, NAME
from clip_prompt_peft.text.packing import PACKED, PLAIN, exact_path
from clip_prompt_peft.towers import find_towers


KNOWN = known_checkpoints()


def rows():
    for name, known in KNOWN.items():
        cells = [f"`{name}`", known.family, known.domain, known.licence or "", known.source, known.checked]
        yield f"| {' | '.join(cells)} |"


def test_the_table_in_the_docs_is_the_list():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `[^`/]+/[^`]+` \|.*$", page, re.MULTILINE) == list(rows())


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_is_well_formed(name):
    known = KNOWN[name]
    validate_repo_id(name)
    assert known.id == name and known.classifier_class in CLASSIFIERS
    assert known.checked in (LOADED, CONFIG, NAME) and known.source and known.domain
    assert known.licence is None or known.licence.strip()


def test_every_family_has_one_and_special_domains_are_there():
    assert {known.classifier_class for known in KNOWN.values()} == set(CLASSIFIERS)
    domains = " ".join(known.domain for known in KNOWN.values())
    assert all(word in domains for word in ("fashion", "street", "pathology", "medicine", "remote sensing"))


def test_no_name_stands_there_twice():
    pairs = []
    text = (ASSETS / "known_checkpoints.json").read_text(encoding="utf-8")
    json.loads(text, object_pairs_hook=lambda found: pairs.append([name for name, _ in found]))
    assert all(len(names) == len(set(names)) for names in pairs)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.checked == CONFIG])
def test_the_class_holds_the_sizes_of_the_checkpoint(name):
    classifier_class = KNOWN[name].classifier_class
    config = classifier_class.config_class()  # transformers: "similar to that of" the checkpoint
    with torch.device("meta"):
        model = classifier_class(config)
    assert type(AutoModelForPromptClassification.from_base(model)) is classifier_class
    for kind in ("text", "vision"):
        (tower,) = find_towers(model, kind)
        assert len(tower.layer_keys) >= 10 and tower.like.shape[1] >= 256
    assert exact_path(model.eval()) in (PACKED, PLAIN) and method_config("clip-lora", model).target_modules
