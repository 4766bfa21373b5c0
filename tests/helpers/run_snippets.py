"""Runs the Python snippets of documents in order and in one namespace, as a reader who pastes one after the other.

    run_snippets.py DOCUMENT [DOCUMENT THAT GOES ON FROM THERE ...]

It runs in a process of its own, in an empty folder, with HF_ENDPOINT set to the stand-in of the Hub.
"""

import shutil
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from readme_snippets import snippets_of

from clip_prompt_peft.data.known_datasets import load_style


def photos(namespace):
    """README: folders of photos, with one sub-folder for each class, and one photo by itself."""
    for split, icons in load_style("noto").items():
        for number, icon in enumerate(icons):
            folder = Path("photos", split, icons.features["label"].names[icon["label"]])
            folder.mkdir(parents=True, exist_ok=True)
            icon["image"].convert("RGB").save(folder / f"{number:03}.png")
    icons[0]["image"].convert("RGB").save("cat.jpg")
    shutil.copytree("photos/test", "photos/validation")  # for docs/uncertainty.md


def names_and_images(namespace):
    """lora_beside_prompts.md: class names, and a few images to train on."""
    namespace["names"] = ["cat", "dog"]
    namespace["train"] = Dataset.from_dict({"pixel_values": torch.randn(4, 3, 48, 48).numpy(), "labels": [0, 1, 0, 1]})


# What the text of a first document takes for granted.
SURROUNDINGS = {"README": photos, "lora_beside_prompts": names_and_images}


def main(documents):
    namespace = {"__name__": "__main__"}
    if documents[0].stem in SURROUNDINGS:
        SURROUNDINGS[documents[0].stem](namespace)
    for document in documents:
        for number, snippet in enumerate(snippets_of(document), start=1):
            print(f"--- {document.name}, snippet {number}", flush=True)
            exec(compile(snippet, f"{document.name}, snippet {number}", "exec"), namespace)


if __name__ == "__main__":
    warnings.simplefilter("default")
    main([Path(name) for name in sys.argv[1:]])
