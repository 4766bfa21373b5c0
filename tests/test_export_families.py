"""Tests of exported classifiers of other model families."""

import os

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from safetensors.torch import load_file

from clip_prompt_peft import CLIPPromptTuningConfig
from clip_prompt_peft.export import CLASS_EMBEDS_FILE, ONNX_FILE, export_classifier


pytestmark = pytest.mark.slow  # exports

OTHERS = ["MetaClip2", "ChineseCLIP", "AltCLIP", "Aimv2", "GroupViT"]


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.6 cannot export its own MultiheadAttention")
# ALL_PRESETS=1 in the environment adds more families, whose tracing takes a while
@pytest.mark.parametrize("name", ["Siglip", *(OTHERS if os.environ.get("ALL_PRESETS") else [])])
def test_onnxruntime_gives_the_logits_of_the_model_with_its_bias(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    family = FAMILIES[name]
    model = get_peft_model(
        family.classifier(), CLIPPromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="RANDOM")
    )
    export_classifier(model.eval(), tmp_path, image_processor=family.image_processor)
    images = family.image_inputs()
    with torch.no_grad():
        expected = model(**images).logits
    session = onnxruntime.InferenceSession(tmp_path / ONNX_FILE, providers=["CPUExecutionProvider"])
    logits, embeds = map(torch.from_numpy, session.run(None, {"pixel_values": images["pixel_values"].numpy()}))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    saved = load_file(tmp_path / CLASS_EMBEDS_FILE)
    by_hand = saved["scale"] * embeds @ saved["class_embeds"].T + saved["bias"]
    torch.testing.assert_close(by_hand, expected, rtol=0, atol=1e-4)


def test_models_of_images_of_any_shape_cannot_be_exported(tmp_path):
    family = FAMILIES["Siglip2"]
    with pytest.raises(ValueError, match="images of any shape.*get_image_features"):
        export_classifier(family.classifier(), tmp_path, image_processor=family.image_processor)
    assert not list(tmp_path.iterdir())
