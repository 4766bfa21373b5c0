"""Class names with characters that nobody sees, and class names that look the same."""

import warnings

import pandas as pd
import pytest
from PIL import Image

from clip_prompt_peft.class_names import warn_of_looks
from clip_prompt_peft.data import class_names_of, clean_class_name, load_image_dataset


INVISIBLE = [
    "\u200b",
    "\ufeff",
    "\u00ad",
    "\u2060",
    "\u200e",
    "\u202e",
    "\u200d",
    "\u180e",
    "\u3164",
    "\x07",
    "\ufe0f",
]


@pytest.mark.parametrize("character", INVISIBLE)
def test_what_nobody_sees_is_named_or_left_out(classifier, character):
    name = f"c{character}at"
    with pytest.warns(UserWarning, match=rf"that nobody sees.*U\+{ord(character):04X}"):
        classifier.set_class_names([name, "dog"])
    assert clean_class_name(name) == "cat"
    with pytest.warns(UserWarning, match="Two class names look the same: .*'cat'"):
        warn_of_looks(["cat", name])


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "c\u0430t"],  # Cyrillic
        ["Apple", "\u0391pple"],  # Greek
        ["fig", "\ufb01g"],  # a ligature
        ["polar bear", "polar\u00a0bear"],
        ["cafe\u0301", "caf\u00e9"],
    ],
)
def test_names_that_look_the_same_are_told(classifier, names):
    with pytest.warns(UserWarning, match="Two class names look the same"):
        classifier.set_class_names(names)


@pytest.mark.parametrize(
    "names",
    [
        ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "1\ufe0f\u20e3"],  # emoji
        ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0915\u094d\u200d\u0937"],  # Persian, Hindi
        ["\u043a\u043e\u0442", "\u0441\u043e\u0431\u0430\u043a\u0430"],  # Russian
        ["Turkey", "turkey", "caf\u00e9", "cafe", "\u72ac"],
    ],
)
def test_other_scripts_and_emoji_are_fine(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_looks(names)
    assert [clean_class_name(name) for name in names] == names


def write(folder, name):
    (folder / name).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (4, 4)).save(folder / name / f"{number}.png")


@pytest.mark.parametrize("character", ["\u200b", "\ufeff", "\u00a0", "\u00ad", " ", "\t"])
@pytest.mark.usefixtures("own_datasets_cache")
def test_class_folders_and_tables(tmp_path, character):
    odd = f"cat{character}"
    folder = tmp_path / "photos"
    for name in (odd, "dog"):
        write(folder, name)
    train = load_image_dataset(folders={"train": folder})["train"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert sorted(class_names_of(train)) == ["cat", "dog"]
    assert character.isspace() or f"(U+{ord(character):04X})" in str(told[0].message)
    rows = [(f"{name}/{number}.png", name) for name in (odd, "dog") for number in range(2)]
    pd.DataFrame(rows, columns=["file_name", "label"]).to_csv(folder / "all.csv", index=False)
    assert sorted(class_names_of(load_image_dataset(files={"train": folder / "all.csv"})["train"])) == ["cat", "dog"]
    write(folder, "cat")
    with pytest.raises(ValueError, match="stands there twice"):
        load_image_dataset(folders={"train": folder})
    with pytest.raises(ValueError, match="stands there twice"):
        load_image_dataset(folders={"train": folder, "test": folder})
    pd.DataFrame([*rows, ("cat/0.png", "cat")], columns=["file_name", "label"]).to_csv(folder / "all.csv", index=False)
    with pytest.raises(ValueError, match="stands there twice"):
        load_image_dataset(files={"train": folder / "all.csv"})
