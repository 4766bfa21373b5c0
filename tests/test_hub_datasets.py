"""Data sets of the Hub whose files have classes in another order are refused after a look at their heads alone."""

import io
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from hub_stand_in import HubStandIn
from PIL import Image as PILImage
from test_hub import run_client


pytestmark = pytest.mark.slow  # a server and a process


def parquet(names):
    """A file that is much larger than its head."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0, 1] * 30}
    features, file = Features({"image": Image(), "label": ClassLabel(names=names)}), io.BytesIO()
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return file.getvalue()


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': dog
          '1': cat
---
"""


@pytest.fixture(scope="module")
def hub():
    ab, ba = parquet(["cat", "dog"]), parquet(["dog", "cat"])
    with HubStandIn() as hub:
        train, test = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
        hub.repos |= {
            "datasets/me/same": {train: ab, test: ab},
            "datasets/me/splits": {train: ab, test: ba},
            "datasets/me/shards": {"data/train-00000-of-00002.parquet": ab, "data/train-00001-of-00002.parquet": ba},
            "datasets/me/card": {train: ab, "README.md": CARD.encode()},
            "datasets/me/private": {train: ab, test: ba},
        }
        hub.private["datasets/me/private"] = "hf_of_a_friend"
        yield hub


@pytest.fixture(scope="module")
def noted(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    named = [(f"me/{name}", {"streaming": streaming}) for name in ("splits", "shards", "card") for streaming in (0, 1)]
    named += [("me/private", {"token": "hf_of_a_friend"}), ("me/same", {"streaming": True}), ("me/same", {})]
    (folder / "datasets.json").write_text(json.dumps(named))
    return json.loads((run_client(hub, folder, "load_datasets") / "noted.json").read_text())


@pytest.mark.parametrize("name", ["splits", "shards", "private"])
def test_other_orders_are_refused_with_both_files(noted, name):
    for error in noted[f"me/{name}"]:
        assert error.startswith("ValueError: The classes of the column 'label' differ from label 0 on")
        assert error.count(f"'hf://datasets/me/{name}@") == 2 and error.count(".parquet'") == 2


def test_a_card_with_another_order_is_refused(noted):
    for error in noted["me/card"]:
        assert "hf://datasets/me/card@" in error and "'its dataset card or `features`' has 2, 'dog', 'cat'" in error


def test_the_same_classes_load(noted):
    assert noted["me/same"] == [[["cat", "dog"]] * 2] * 2


def test_only_the_heads_of_refused_files_were_read(hub, noted):
    for path, content in hub.repos["datasets/me/shards"].items():
        assert hub.sent[path] == 2 * 2**16 < len(content)  # it was asked for twice
