"""The script that classifies an image with an exported classifier and three packages."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import EMOJI, ROOT, TINY_CLIP
from PIL import Image
from transformers import AutoImageProcessor

from clip_prompt_peft import CLIPForPromptClassification
from clip_prompt_peft.data import class_names_of, load_image_dataset
from clip_prompt_peft.evaluation.conformal import ConformalClassifier
from clip_prompt_peft.export import export_classifier


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# the script, in an interpreter that has nothing else to import
RUN = """
import runpy, sys
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
others = {"torch", "transformers", "peft", "safetensors", "clip_prompt_peft", "onnx"} & set(sys.modules)
sys.exit(f"imported {others}" if others else 0)
"""


@pytest.mark.slow
def test_it_prints_the_models_probabilities_for_pictures_of_any_shape(tmp_path):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset)).eval()
    export_classifier(model, tmp_path)
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    for size in ((64, 64), (101, 70)):
        image = dataset[7]["image"].resize(size)
        image.save(tmp_path / "picture.png")
        with torch.no_grad():
            picture = Image.open(tmp_path / "picture.png").convert("RGB")
            probabilities = model(**processor(picture, return_tensors="pt")).logits[0].softmax(dim=0)
        arguments = [ROOT / "examples" / "classify_onnx.py", tmp_path, tmp_path / "picture.png"]
        done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = re.findall(r"^ *([\d.]+)%  (\w+)$", done.stdout, re.MULTILINE)
        values, labels = probabilities.topk(5)
        assert [name for _, name in lines] == [model.class_names[label] for label in labels]
        assert [float(value) for value, _ in lines] == pytest.approx((100 * values).tolist(), abs=0.06)


@pytest.mark.slow
def test_it_prints_the_models_sets_of_classes(tmp_path):
    dataset = load_image_dataset(files={"train": str(EMOJI / "noto-test.parquet")})["train"]
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names_of(dataset)).eval()
    model.set_temperature(1.7)
    dataset[7]["image"].save(tmp_path / "picture.png")
    script = [sys.executable, ROOT / "examples" / "classify_onnx.py", tmp_path, tmp_path / "picture.png"]
    export_classifier(model, tmp_path)
    done = subprocess.run([*script, "0.9"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the classifier was not calibrated" in done.stderr
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    for method in ("lac", "aps"):
        conformal = ConformalClassifier.fit(model, dataset.select(range(40)), processor, method=method)
        export_classifier(model, tmp_path)
        for coverage in (0.3, 0.8, 0.99):
            names = conformal.predict_set([tmp_path / "picture.png"], coverage).names[0]
            done = subprocess.run([*script, str(coverage)], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert re.findall(r"^ *[\d.]+%  (\w+)$", done.stdout, re.MULTILINE) == names
