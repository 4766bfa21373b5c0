"""Classifies an image with an exported classifier. Needs only onnxruntime, numpy and pillow.

python examples/classify_onnx.py EXPORTED_FOLDER IMAGE [COVERAGE]

With a coverage such as 0.9, it prints the set of classes that holds the right one with this probability, if the
classifier was calibrated.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(file):
    """Returns an RGB image, decoded as clip_prompt_peft.image_files.decode_image does."""
    opened = Image.open(file)
    image = ImageOps.exif_transpose(opened)
    mode = "I;16" if (image.mode, opened.format) == ("I", "PNG") else image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):  # more than 8 bits
        values, slack = np.asarray(image), 1e-3 * (mode == "F")
        ranges = {"I": (255, 65535), "F": (1, 255, 65535)}.get(mode, (65535,))
        low, high = values.min(), values.max()
        white = next((top for top in ranges if -slack * top <= low <= high <= (1 + slack) * top), None)
        if white is None or white != ranges[0] and high <= white // 16:
            sys.exit(f"{file}: values from {low} to {high} (mode {mode}) do not say which value is white")
        values = values.clip(0, white)
        values = values.astype(np.uint16) >> 8 if white == 65535 else (values * (255 / white)).round()
        image = Image.fromarray(values.astype(np.uint8))
        if opened.format == "TIFF" and opened.tag_v2.get(262) == 0:  # white is zero
            image = ImageOps.invert(image)
    return image.convert("RGB")


def in_set(probabilities, coverage):
    """Returns which classes are in the set, as ConformalClassifier of clip_prompt_peft does."""
    path = Path(folder, "conformal.json")
    if not path.exists():
        sys.exit(
            f"{folder} holds no conformal.json: the classifier was not calibrated (clip-prompt train --calibrate)"
        )
    conformal = json.loads(path.read_text())
    scores, n = conformal["scores"], conformal["num_images"]
    rank = math.ceil((n + 1) * coverage - 1e-9)
    bound = scores[math.ceil(rank * len(scores) / n) - 1] if rank <= n else math.inf  # too few images: all classes
    if conformal["method"] == "lac":
        return 1 - probabilities <= bound
    order = (-probabilities).argsort(kind="stable")
    before = probabilities[order].cumsum() - probabilities[order]
    before[0] = 0
    before += np.random.random() * probabilities[order] if conformal["randomized"] else 0
    return before[order.argsort()] <= bound


if len(sys.argv) not in (3, 4):
    sys.exit(__doc__.strip())
folder, file = sys.argv[1:3]
coverage = float(sys.argv[3]) if len(sys.argv) == 4 else None
if coverage is not None and not 0 < coverage < 1:
    sys.exit(f"COVERAGE must lie between 0 and 1, got {coverage}")
labels, config = (json.loads(Path(folder, f"{name}.json").read_text()) for name in ("labels", "preprocessor_config"))
image = read(file)
short, height, width = config["size"]["shortest_edge"], config["crop_size"]["height"], config["crop_size"]["width"]
size, crop = np.array(image.size), np.array([width, height])
resized = short * size // size.min()
corner = (resized - crop) // 2
box = [*(corner * size / resized), *((corner + crop) * size / resized)]
image = image.resize((width, height), config["resample"], box)  # only the center of what would be resized
pixels = np.asarray(image, np.float32) * config["rescale_factor"]
pixels = ((pixels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)
logits = onnxruntime.InferenceSession(f"{folder}/model.onnx").run(["logits"], {"pixel_values": pixels})[0][0]
logits = logits.astype(np.float64)
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = probabilities.argsort()[::-1]
shown = best[:5] if coverage is None else best[in_set(probabilities, coverage)[best]]
for i in shown:
    print(f"{probabilities[i]:6.1%}  {labels[i]}")
if not len(shown):
    print("none: the classifier does not know")
