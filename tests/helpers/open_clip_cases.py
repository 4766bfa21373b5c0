"""Tiny models of open_clip with values that everybody can make again, and what open_clip itself computes with them.

The golden numbers are in `tests/golden/open_clip`, recorded by `tests/golden/record_open_clip.py`.
"""

import copy
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clip_prompt_peft.open_clip import trunks
from clip_prompt_peft.open_clip.trunks import GELU, TANH, Trunk


GOLDEN = Path(__file__).parent.parent / "golden" / "open_clip"
SIDE, NUM_IMAGES, NUM_TEXTS = 24, 4, 5

# Image towers that timm does not have. The recording registers them there.
TRUNKS = {
    f"vit_tiny_patch8_siglip_{kind}": Trunk(32, 2, 4, 120, 8, SIDE, activation)
    for kind, activation in (("gelu", GELU), ("tanh", TANH))
}
trunks.TRUNKS.update(TRUNKS)
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIDE}
TEXT = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 99, "context_length": 16}
SIGLIP_TEXT = {
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"}, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
}  # fmt: skip


def clip(vision=None, text=None, **top):
    return {"embed_dim": 24, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}, **top}


def siglip(kind="gelu", text=None, **top):
    trunk = {"timm_model_name": f"vit_tiny_patch8_siglip_{kind}", "timm_pool": "map", "timm_proj": "none"}
    top = {"embed_dim": 32, "custom_text": True, "init_logit_bias": -10, **top}
    vision = {"image_size": SIDE, "timm_model_pretrained": False, **trunk}
    return {**top, "vision_cfg": vision, "text_cfg": {**TEXT, **SIGLIP_TEXT, **(text or {})}}


CASES = {
    "plain": clip(),
    "own text class": clip(custom_text=True),
    "quick gelu": clip(quick_gelu=True),
    "tanh gelu": clip({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}),
    "layer scale in the image tower": clip({"ls_init_value": 1e-4}),
    "layer scale in the text tower": clip(text={"ls_init_value": 0.1}, custom_text=True),
    "patch dropout": clip({"patch_dropout": 0.5}),
    "longer context": clip(text={"context_length": 40, "pad_id": 5}),
    "end token": clip(text={"pool_type": "eos", "eos_id": 2}),
    "another end token": clip(text={"pool_type": "eos", "eos_id": 7}, quick_gelu=True),
    "odd widths of layers": clip({"mlp_ratio": 4.9231}, {"mlp_ratio": 3.7362}),
    "other numbers of heads": clip({"head_width": 8}, {"heads": 8}),
    "towers of two widths": clip({"width": 48}, {"width": 40, "heads": 5}),
    "bias of the projection": clip(text={"proj_bias": True}, custom_text=True),
    "no projection": clip(text={"proj_type": "none"}, embed_dim=32),
    "eps": clip({"norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-2}}),
    "custom blocks": clip({"block_type": "custom"}, {"block_type": "custom"}),
    "logit scale of one dimension": clip(nonscalar_logit_scale=True),
    "table of sines": clip({"pos_embed_type": "sin_cos_2d"}),
    "norm after pooling": clip({"final_ln_after_pool": True}, {"final_ln_after_pool": True}),
    "SigLIP": siglip(),
    "SigLIP 2": siglip(text={"act_kwargs": {"approximate": "tanh"}}),
    "SigLIP 2 with tanh in both": siglip("tanh", {"act_kwargs": {"approximate": "tanh"}}),
    "SigLIP without projection": siglip(text={"proj_bias": False, "proj_type": "none"}),
    "SigLIP without bias of the projection": siglip(text={"proj_bias": False}),
    "SigLIP without bias of the logits": siglip(init_logit_bias=None),
    "SigLIP with narrow texts": siglip(text={"width": 16, "context_length": 64}),
}


def values(name, shape):
    """The values of a tensor, which depend on nothing but its name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randint(-(2**20), 2**20, tuple(shape), generator=generator).float() / 2**20  # from -1 to 1
    kind = name.rpartition(".")[2]
    if kind == "logit_scale":
        return torch.full(tuple(shape), math.log(100))
    if kind == "logit_bias":
        return torch.full(tuple(shape), -10.0)
    if kind == "gamma":
        return 0.5 + 0.4 * noise
    if len(shape) == 1:
        return 1 + 0.3 * noise if kind == "weight" else 0.3 * noise
    if "embed" in name or kind == "latent":
        return noise
    return noise * math.sqrt(3 / noise[0].numel())


def pixel_values():
    return 2 * values("pixels", (NUM_IMAGES, 3, SIDE, SIDE))


def token_ids(model_cfg):
    """Texts of several lengths: the end token in its place, and padding."""
    text = model_cfg["text_cfg"]
    length, vocab = text["context_length"], text["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, vocab - 1, (NUM_TEXTS, length), generator=generator)
    end = text["eos_id"] if text.get("pool_type") == "eos" else vocab - 1
    for row, position in enumerate(range(4, 4 + NUM_TEXTS)):
        ids[row, position], ids[row, position + 1 :] = end, text.get("pad_id", 0)
    return ids


def recorded(name):
    """A file of the recording."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


class Case:
    """A tiny model, as open_clip wrote it."""

    def __init__(self, name):
        self.name, info = name, recorded("cases.json")["cases"][name]
        self.model_cfg, self.shapes = info["model_cfg"], info["shapes"]
        numbers = load_file(GOLDEN / "cases.safetensors")
        self.image_embeds, self.text_embeds, self.logits = (
            numbers[f"{name}.{part}"] for part in ("image", "text", "logits")
        )
        sizes = {tensor: [int(size) for size in shape.split("x") if size] for tensor, shape in self.shapes.items()}
        self.tensors = {tensor: values(tensor, shape) for tensor, shape in sizes.items()}

    def write(self, folder, preprocess_cfg=None, pickled=False, tensors=None):
        """Writes the folder that open_clip's `save_for_hf` writes."""
        folder.mkdir(exist_ok=True, parents=True)
        config = {"model_cfg": copy.deepcopy(self.model_cfg), "preprocess_cfg": preprocess_cfg or {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        tensors = self.tensors if tensors is None else tensors
        if pickled:
            torch.save(tensors, folder / "open_clip_pytorch_model.bin")
        else:
            save_file(tensors, folder / "open_clip_model.safetensors")
        return folder


def with_openai_s_vocabulary(folder, name="plain", preprocess_cfg=None):
    """Writes a tiny model that reads texts as most published ones do."""
    case = Case(name)
    case.model_cfg["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    for tensor, shape in (("token_embedding.weight", (49408, 32)), ("positional_embedding", (77, 32))):
        case.tensors[tensor] = values(tensor, shape)
    return case.write(folder, preprocess_cfg)


def table(architectures):
    """The table of the docs, from the recording."""
    rows = ["| open_clip | transformers | layers | image | text | logits | tuned, reloaded |", "|---" * 7 + "|"]
    for name, one in architectures.items():
        if "layers" in one:
            numbers = (f"{one[part]:.0e}" if one[part] else "0" for part in ("image", "text", "logits", "tuned"))
            rows.append(f"| {' | '.join((name, one['class'], one['layers'], *numbers))} |")
    return "\n".join(rows)


# Why architectures are refused, by what a part is called; the first that fits counts.
REASONS = {
    "multimodal_cfg": "CoCa's decoder",
    "(a ResNet)": "image towers that are ResNets",
    "(an image tower of timm": "image towers of timm other than SigLIP's (ConvNeXt, EVA, MobileCLIP, ViTamin, ...)",
    "hf_model_name": "text towers that are not open_clip's own (RoBERTa, XLM-R, mT5, NLLB)",
    "no_ln_pre": "CLIPA: no LayerNorm in front, average and last-token pooling",
}


def refusals(architectures):
    """The table of what is refused in the docs, from the recording."""
    counts = dict.fromkeys(REASONS.values(), 0)
    for one in architectures.values():
        if "parts" in one:
            counts[next(reason for mark, reason in REASONS.items() if any(mark in part for part in one["parts"]))] += 1
    return "\n".join(
        ["| in the way | architectures |", "|---|---|", *(f"| {why} | {n} |" for why, n in counts.items())]
    )
