"""Classifies an image with an exported classifier. Needs only onnxruntime, numpy and pillow.

python examples/classify_onnx.py EXPORTED_FOLDER IMAGE
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


folder, file = sys.argv[1:]
labels, config = (json.loads(Path(folder, f"{name}.json").read_text()) for name in ("labels", "preprocessor_config"))
image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
short, height, width = config["size"]["shortest_edge"], config["crop_size"]["height"], config["crop_size"]["width"]
image = image.resize([short * side // min(image.size) for side in image.size], config["resample"])
left, top = (image.width - width) // 2, (image.height - height) // 2
pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) * config["rescale_factor"]
pixels = ((pixels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)
logits = onnxruntime.InferenceSession(f"{folder}/model.onnx").run(["logits"], {"pixel_values": pixels})[0][0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for i in probabilities.argsort()[::-1][:5]:
    print(f"{probabilities[i]:6.1%}  {labels[i]}")
