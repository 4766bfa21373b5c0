"""Records what open_clip computes, and compares every architecture in its list with the model that is built here.

    pip install --no-deps open_clip_torch==3.3.0 timm torchvision ftfy wcwidth
    python tests/golden/record_open_clip.py

writes `tests/golden/open_clip`: tiny models, texts and images for the tests, which need none of these packages, and
`architectures.json` for the table in docs/open_clip.md. It takes half an hour on two cores.
"""

import argparse
import copy
import gc
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.library import Library


# torchvision for a card does not find its operators beside torch for the CPU. Its transforms need none of them.
TORCHVISION = Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models import register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from families import clip_tokenizer, siglip_tokenizer, xlm_tokenizer  # noqa: E402
from open_clip_cases import CASES, GOLDEN, TRUNKS, pixel_values, recorded, table, token_ids, values  # noqa: E402
from peft import get_peft_model  # noqa: E402

from clip_prompt_peft import (  # noqa: E402
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPPromptTuningConfig,
)
from clip_prompt_peft.families import classifier_class  # noqa: E402
from clip_prompt_peft.open_clip import trunks  # noqa: E402
from clip_prompt_peft.open_clip.config import UnsupportedOpenClipModel, read_config  # noqa: E402
from clip_prompt_peft.open_clip.weights import convert  # noqa: E402


CLASS_NAMES = ["cat", "fire truck", "owl", "sun"]
TEXTS = [
    "a photo of a cat.", "A  Photo of a\tFIRE truck, isn't it?", "naïve café über Ærøskøbing", "一张猫的照片。",
    "x" * 40, "Ursus_arctos (brown bear) #1 & 50% - 3.14!", "it's we've they'll I'm 'quoted' don't", "",
    "emoji 🐱🚒 and ☃", "a photo of a cat" * 30, "<|endoftext|>", "Émile Zola; 12345 67", "Ωmega ß straße İstanbul",
]  # fmt: skip
PREPROCESSING = {
    "shortest": {},
    "bilinear": {"interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
    "squash": {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
    "longest": {"resize_mode": "longest"},
}
IMAGE_SIZES = [(60, 40), (40, 52), (24, 24), (96, 24)]  # width, height
# Of these, all layers are compared, and of the others the first ones, at their full widths.
WHOLE = {
    "ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-L-14", "ViT-M-16-alt",
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-256", "ViT-B-16-SigLIP-384", "ViT-B-16-SigLIP2",
}  # fmt: skip
FEW_LAYERS = 2


def register_tiny_trunks():
    for name, trunk in TRUNKS.items():

        def create(pretrained=False, trunk=trunk, **kwargs):
            return VisionTransformer(
                img_size=trunk.image_size, patch_size=trunk.patch_size, embed_dim=trunk.width, depth=trunk.layers,
                num_heads=trunk.heads, mlp_ratio=trunk.intermediate_size / trunk.width, class_token=False,
                global_pool="map", act_layer="gelu_tanh" if "tanh" in trunk.hidden_act else None,
                num_classes=kwargs.get("num_classes", 0),
            )  # fmt: skip

        create.__name__, create.__module__ = name, "timm.models.vision_transformer"
        register_model(create)


def new_model(model_cfg, **kwargs):
    """The model of open_clip for a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": copy.deepcopy(model_cfg), "preprocess_cfg": {}}
        Path(folder, "open_clip_config.json").write_text(json.dumps(config))
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False, **kwargs).eval()


@torch.no_grad()
def computed(model, images, ids):
    """Normalized embeddings and logits."""
    image, text = (F.normalize(x, dim=-1) for x in (model.encode_image(images), model.encode_text(ids)))
    return {"image": image, "text": text, "logits": model.get_logits(images, ids)[0]}


def record_cases():
    register_tiny_trunks()
    numbers, cases = {}, {}
    for name, model_cfg in CASES.items():
        model = new_model(model_cfg)
        shapes = {tensor: list(value.shape) for tensor, value in model.state_dict().items()}
        model.load_state_dict({tensor: values(tensor, shape) for tensor, shape in shapes.items()})
        shapes = {tensor: "x".join(map(str, shape)) for tensor, shape in shapes.items()}
        results = computed(model, pixel_values(), token_ids(model_cfg))
        numbers |= {f"{name}.{part}": value.contiguous() for part, value in results.items()}
        cases[name] = {"model_cfg": model_cfg, "shapes": shapes}
    save_file(numbers, GOLDEN / "cases.safetensors")
    write("cases.json", {"open_clip": open_clip.__version__, "timm": timm.__version__, "cases": cases})


def record_texts():
    found = {
        clean: [SimpleTokenizer(clean=clean, context_length=200)(text)[0].tolist() for text in TEXTS]
        for clean in ("lower", "canonicalize")
    }
    found = {
        clean: [ids[: ids.index(49407) + 1] if text != "<|endoftext|>" else None for text, ids in zip(TEXTS, rows)]
        for clean, rows in found.items()
    }
    kinds = ("lower", "canonicalize", "whitespace")
    cleaned = {clean: [get_clean_fn(clean)(text) for text in TEXTS] for clean in kinds}
    write("texts.json", {"texts": TEXTS, "token_ids": found, "cleaned": cleaned})


def record_pixels():
    numbers = {}
    for name, settings in PREPROCESSING.items():
        transform = image_transform_v2(PreprocessCfg(size=24, **settings), is_train=False)
        for width, height in IMAGE_SIZES:
            pixels = (127.5 * (values(f"{width}x{height}", (height, width, 3)) + 1)).byte()
            numbers[f"{name}.{width}x{height}"] = transform(Image.fromarray(pixels.numpy())).contiguous()
    numbers = {name: value.half() for name, value in numbers.items()}
    save_file(numbers, GOLDEN / "pixels.safetensors")
    write("pixels.json", PREPROCESSING)


def record_architectures(names):
    """Maps every architecture and compares shapes, then the numbers of those that are named, by default of all."""
    path = GOLDEN / "architectures.json"
    known = recorded(path.name)["architectures"] if path.exists() else {}
    mapped = {}
    for name in sorted(open_clip.list_models()):
        model_cfg = open_clip.get_model_config(name)
        try:
            mapped[name] = compare_shapes(name, model_cfg)
        except UnsupportedOpenClipModel as error:
            known[name] = {"parts": error.parts}
        else:
            known.setdefault(name, {"class": mapped[name]})
    for name in names or mapped:
        if name in mapped:
            known[name] = {"class": mapped[name], **compare_numbers(name, open_clip.get_model_config(name))}
            print(name, known[name], flush=True)
        found = {"open_clip": open_clip.__version__, "timm": timm.__version__}
        write(path.name, {**found, "architectures": dict(sorted(known.items()))})


def compare_shapes(name, model_cfg):
    """Compares names and shapes of the tensors at full size, and returns the name of the class."""
    config = read_config({"model_cfg": model_cfg}, name)
    with torch.device("meta"):
        theirs = new_model(model_cfg, device="meta")
        ours = classifier_class(config.transformers).base_class(config.transformers)
    tensors = convert(config, theirs.state_dict(), name)
    expected = {key: value.shape for key, value in ours.state_dict().items()}
    assert {key: value.shape for key, value in tensors.items()} == expected, name
    return type(ours).__name__


def compare_numbers(name, model_cfg):
    """Compares embeddings and logits at full width."""
    trunk, text = model_cfg["vision_cfg"].get("timm_model_name"), model_cfg["text_cfg"]
    make_tokenizer = siglip_tokenizer if trunk else xlm_tokenizer if text.get("pool_type") == "eos" else clip_tokenizer
    text["vocab_size"] = 2000  # tables of tokens make up most of the memory, and have nothing to compare
    if name in WHOLE:
        return {"layers": "all", **differences(model_cfg, make_tokenizer())}
    model_cfg["vision_cfg"]["layers"] = text["layers"] = FEW_LAYERS
    with few_layers_of_timm(trunk):
        return {"layers": str(FEW_LAYERS), **differences(model_cfg, make_tokenizer())}


class few_layers_of_timm:
    """timm and our table have so few layers in this tower for a while."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        if self.name:
            self.trunk, self.create = trunks.TRUNKS[self.name], timm.create_model
            trunks.TRUNKS[self.name] = replace(self.trunk, layers=FEW_LAYERS)
            timm.create_model = lambda *args, **kwargs: self.create(*args, **{**kwargs, "depth": FEW_LAYERS})

    def __exit__(self, *exception):
        if self.name:
            trunks.TRUNKS[self.name], timm.create_model = self.trunk, self.create


def differences(model_cfg, tokenizer):
    torch.manual_seed(0)
    model = new_model(model_cfg)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():  # norms, scales and biases are to matter
        if key == "logit_scale":
            parameter.data.fill_(math.log(100))
        elif parameter.ndim == 1:
            is_factor = "weight" in key or "gamma" in key
            parameter.data.copy_(is_factor + 0.3 * torch.randn(parameter.shape, generator=generator))
    side = model.visual.image_size[0]
    images, ids = torch.randn(2, 3, side, side, generator=generator), token_ids(model_cfg)
    expected = computed(model, images, ids)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, base / "open_clip_model.safetensors")
        del model, tensors
        gc.collect()
        ours = AutoModelForPromptClassification.from_pretrained(base).eval()
        with torch.no_grad():
            output = ours(input_ids=ids, pixel_values=images)
        actual = {"image": output.image_embeds, "text": output.text_embeds, "logits": output.logits_per_image}
        found = {part: float((actual[part] - expected[part]).abs().max()) for part in expected}
        return {**found, "tuned": tuned_and_reloaded(ours, tokenizer, base, Path(folder, "adapter"), images)}


def tuned_and_reloaded(ours, tokenizer, base, folder, images):
    """The largest difference of logits after a step of training, between the model and what is loaded again."""
    ours.tokenizer = tokenizer
    ours.set_class_names(CLASS_NAMES)
    model = get_peft_model(ours, CLIPPromptTuningConfig(prompt_template="a photo of a {}."))
    with torch.no_grad():
        embeds = model.get_image_features(pixel_values=images).pooler_output
        zero_shot = model(image_embeds=embeds).logits
    model(image_embeds=embeds, labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * parameter.grad.sign()
        tuned = model.eval()(image_embeds=embeds).logits
    assert (tuned - zero_shot).abs().max() > 1e-3
    model.save_pretrained(folder)
    del model, ours
    gc.collect()
    again = AutoPeftModelForPromptClassification.from_pretrained(folder, tokenizer=tokenizer).eval()
    assert again.active_peft_config.base_model_name_or_path == str(base)
    with torch.no_grad():
        return float((again(pixel_values=images).logits - tuned).abs().max())


def write(name, content):
    (GOLDEN / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="architectures whose numbers are compared")
    parser.add_argument("--no_architectures", action="store_true", help="record the cases of the tests only")
    arguments = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    if not arguments.only:
        record_cases()
        record_texts()
        record_pixels()
    if not arguments.no_architectures:
        record_architectures(arguments.only)
        print(table(recorded("architectures.json")["architectures"]))
