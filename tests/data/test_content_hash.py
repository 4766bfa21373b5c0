from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from clip_prompt_peft.data import content_hash, load_image_dataset


def dataset(values, labels, names=("cat", "dog")):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    images = [PILImage.new("RGB", (4, 4), (value, 0, 0)) for value in values]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_the_same_examples_have_the_same_hash():
    assert content_hash(dataset([1, 2], [0, 1])) == content_hash(dataset([1, 2], [0, 1]))
    assert len(content_hash(dataset([1, 2], [0, 1]))) == 16


def test_another_image_name_or_order_changes_the_hash():
    hashes = [
        content_hash(dataset([1, 2], [0, 1])),
        content_hash(dataset([1, 3], [0, 1])),
        content_hash(dataset([1, 2], [0, 0])),
        content_hash(dataset([1, 2], [0, 1], ("cat", "owl"))),
        content_hash(dataset([2, 1], [1, 0])),
    ]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_depends_on_the_content_of_files_and_not_on_their_path(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for root in ("here", "there"):
        for value, name in enumerate(("cat", "dog")):
            (tmp_path / root / name).mkdir(parents=True)
            PILImage.new("RGB", (4, 4), (value, 0, 0)).save(tmp_path / root / name / "1.png")
    here, there = (load_image_dataset(folders={"train": str(tmp_path / root)})["train"] for root in ("here", "there"))
    assert content_hash(here) == content_hash(there)
