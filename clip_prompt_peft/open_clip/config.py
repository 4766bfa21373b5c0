"""From the configuration of an open_clip model to that of the equal model in transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import CLIPConfig, MetaClip2Config, PreTrainedConfig, SiglipConfig

from .fields import BLOCK_FEATURES, PREPROCESS, TEXT, TOP, VISION, name_of, with_defaults
from .trunks import TANH, Trunk, trunk_of


WORKS = (
    "What works: ViT image towers with a class token beside open_clip's own causal text tower, in all sizes, which "
    "become a CLIPModel (pooled at the highest token id) or a MetaClip2Model (pooled at the end token), and the "
    "SigLIP models (timm's vit_*_patch*_siglip_* beside a text tower that reads both ways), which become a "
    "SiglipModel."
)
DEFAULT_EPS = 1e-5  # of torch's LayerNorm
OPENAI_START, SIGLIP_END = 49406, 1  # token ids
LARGEST_POOLED = 2  # as eos_token_id of CLIP it means: pool at the highest token id


@dataclass(frozen=True)
class OpenClipConfig:
    """
    The configuration of a model of open_clip that transformers can express.

    Args:
        transformers (`PreTrainedConfig`):
            The configuration of the equal model in transformers.
        model (`dict[str, Any]`), vision (`dict[str, Any]`), text (`dict[str, Any]`), preprocess (`dict[str, Any]`):
            The fields of open_clip, with their defaults.
    """

    transformers: PreTrainedConfig
    model: dict[str, Any] = field(repr=False)
    vision: dict[str, Any] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    preprocess: dict[str, Any] = field(repr=False)

    @property
    def image_size(self) -> int:
        """The side of the images in pixels."""
        return self.transformers.vision_config.image_size


class UnsupportedOpenClipModel(ValueError):
    """A model of open_clip has parts that no class of transformers can express. `parts` names them."""

    def __init__(self, name: str, parts: list[str]) -> None:
        self.parts = parts
        super().__init__(
            f"The open_clip model {name!r} cannot be expressed in transformers. In the way: {'; '.join(parts)}. "
            f"{WORKS}"
        )


def read_config(content: object, name: str) -> OpenClipConfig:
    """Reads the content of an `open_clip_config.json`.

    Args:
        content (`object`):
            What the file holds.
        name (`str`):
            What the model is called in error messages.

    Raises:
        UnsupportedOpenClipModel: If a part of the model has no place in a class of transformers.
        ValueError: If the configuration is damaged.
    """
    if not isinstance(content, dict) or "model_cfg" not in content:
        raise ValueError(f"The open_clip configuration of {name!r} is damaged: there is no 'model_cfg' in it.")
    try:
        model = with_defaults(content["model_cfg"], TOP, "")
        vision = with_defaults(model["vision_cfg"], VISION, "vision_cfg")
        text = with_defaults(model["text_cfg"], TEXT, "text_cfg")
        given = content.get("preprocess_cfg") or {}
        if isinstance(given, dict):
            given = {key: value for key, value in given.items() if value is not None}
        preprocess = with_defaults(given, PREPROCESS, "preprocess_cfg")
    except ValueError as error:
        raise ValueError(f"The open_clip configuration of {name!r} is damaged: {error}") from error
    trunk = trunk_of(vision["timm_model_name"]) if vision["timm_model_name"] else None
    parts = [*_parts_of_both(model, vision, text), *_parts_of_image_tower(model, vision, trunk)]
    parts += [*_parts_of_text_tower(model, text, trunk), *_parts_of_preprocessing(preprocess)]
    parts = parts or _unknown_fields(model, vision, text)
    if parts:
        raise UnsupportedOpenClipModel(name, parts)
    try:
        config = _siglip(model, text, trunk) if trunk else _clip(model, vision, text)
    except ValueError as error:
        raise ValueError(f"The open_clip configuration of {name!r} is damaged: {error}") from error
    return OpenClipConfig(config, model, vision, text, preprocess)


# What is in the way


def _parts_of_both(model, vision, text) -> list[str]:
    parts = []
    if model["multimodal_cfg"] is not None:
        parts.append("multimodal_cfg (CoCa's decoder)")
    for where, section in (("vision_cfg", vision), ("text_cfg", text)):
        if section["block_type"] != "default":
            parts += [
                f"{where}.{name} (a norm or scale inside the blocks)" for name in BLOCK_FEATURES if section[name]
            ]
        parts += _parts_of_act_and_norm(section, where, model["quick_gelu"])
    return parts


def _parts_of_act_and_norm(section, where, quick_gelu) -> list[str]:
    parts = []
    act, norm = section["act_kwargs"] or {}, section["norm_kwargs"] or {}
    if act and (quick_gelu or set(act) != {"approximate"} or act["approximate"] not in ("none", "tanh")):
        parts.append(f"{where}.act_kwargs {act} (an activation other than GELU, its tanh form, or QuickGELU)")
    if set(norm) - {"eps"} or ("eps" in norm and not isinstance(norm["eps"], float)):
        parts.append(f"{where}.norm_kwargs {norm} (a LayerNorm without weights)")
    return parts


def _parts_of_image_tower(model, vision, trunk: Trunk | None) -> list[str]:
    if vision["timm_model_name"]:
        return _parts_of_timm_tower(model, vision, trunk)
    if isinstance(vision["layers"], list):
        return [f"vision_cfg.layers {vision['layers']!r} (a ResNet)"]
    parts = []
    if vision["attentional_pool"]:
        parts.append("vision_cfg.attentional_pool (attention pooling)")
    if vision["no_ln_pre"]:
        parts.append("vision_cfg.no_ln_pre (no LayerNorm in front of the blocks, as in CLIPA)")
    if vision["pool_type"] != "tok":
        parts.append(f"vision_cfg.pool_type {vision['pool_type']!r} (pooling other than the class token)")
    if vision["pos_embed_type"] not in ("learnable", "sin_cos_2d"):  # both come as a table
        parts.append(f"vision_cfg.pos_embed_type {vision['pos_embed_type']!r}")
    for name in ("image_size", "patch_size"):
        if _side(vision[name]) is None:
            parts.append(f"vision_cfg.{name} {vision[name]!r} (not a square)")
    if model["init_logit_bias"] is not None:
        parts.append("init_logit_bias (a bias of the logits beside a ViT with a class token)")
    return parts


def _parts_of_timm_tower(model, vision, trunk: Trunk | None) -> list[str]:
    name = vision["timm_model_name"]
    parts = []
    if vision["timm_proj"] == "mlp":
        parts.append("vision_cfg.timm_proj 'mlp' (a projection of two layers)")
    if trunk is None:
        return [f"vision_cfg.timm_model_name {name!r} (an image tower of timm that is not SigLIP's)", *parts]
    if vision["timm_pool"] != "map":
        parts.append(f"vision_cfg.timm_pool {vision['timm_pool']!r} (pooling other than 'map')")
    if vision["timm_proj"] not in ("none", "mlp"):
        parts.append(f"vision_cfg.timm_proj {vision['timm_proj']!r} (a projection of images)")
    if model["embed_dim"] != trunk.width:
        parts.append(f"embed_dim {model['embed_dim']} beside an image tower of width {trunk.width}")
    if _side(vision["image_size"]) != trunk.image_size:
        parts.append(f"vision_cfg.image_size {vision['image_size']!r} beside {name!r}")
    return parts


def _parts_of_text_tower(model, text, trunk: Trunk | None) -> list[str]:
    if text["hf_model_name"]:
        return [f"text_cfg.hf_model_name {text['hf_model_name']!r} (a text tower that is not open_clip's own)"]
    parts = []
    if text["embed_cls"]:
        parts.append("text_cfg.embed_cls (a class token at the end of texts)")
    if text["proj_type"] not in ("linear", "none"):
        parts.append(f"text_cfg.proj_type {text['proj_type']!r} (a projection that is not linear)")
    if text["proj_type"] == "none" and text["width"] != model["embed_dim"]:
        parts.append(f"text_cfg.proj_type 'none' from width {text['width']} to embed_dim {model['embed_dim']}")
    if text["tokenizer_mode"]:
        parts.append(f"text_cfg.tokenizer_mode {text['tokenizer_mode']!r}")
    if trunk is not None:
        if not text["no_causal_mask"]:
            parts.append("a causal text tower beside an image tower of SigLIP")
        if text["pool_type"] != "last":
            parts.append(f"text_cfg.pool_type {text['pool_type']!r} beside an image tower of SigLIP")
        return parts
    if text["no_causal_mask"]:
        parts.append("text_cfg.no_causal_mask (a text tower that reads both ways, without SigLIP's image tower)")
    if text["pool_type"] not in ("argmax", "eos"):
        parts.append(f"text_cfg.pool_type {text['pool_type']!r} (pooling other than at the end token)")
    return parts


def _parts_of_preprocessing(preprocess) -> list[str]:
    parts = []
    allowed = {
        "mode": ("RGB",),
        "interpolation": ("bicubic", "bilinear", "random"),
        "resize_mode": ("shortest", "longest", "squash"),
    }
    for name, values in allowed.items():
        if preprocess[name] not in values:
            parts.append(f"preprocess_cfg.{name} {preprocess[name]!r}")
    if preprocess["resize_mode"] == "longest" and preprocess["fill_color"] != 0:
        parts.append(f"preprocess_cfg.fill_color {preprocess['fill_color']!r} (borders other than black)")
    return parts


def _unknown_fields(model, vision, text) -> list[str]:
    sections = (("", model, TOP), ("vision_cfg", vision, VISION), ("text_cfg", text, TEXT))
    return [
        f"{name_of(where, name)} (a field that is not known here)"
        for where, section, known in sections
        for name in section
        if name not in known
    ]


# What becomes of it


def _clip(model, vision, text) -> PreTrainedConfig:
    pools_at_end_token = text["pool_type"] == "eos"
    width = vision["width"]
    tower = {
        **_tower(vision, "vision_cfg", model["quick_gelu"], heads=width // vision["head_width"]),
        "image_size": _side(vision["image_size"]),
        "patch_size": _side(vision["patch_size"]),
        "projection_dim": model["embed_dim"],
    }
    return (MetaClip2Config if pools_at_end_token else CLIPConfig)(
        vision_config=tower,
        text_config={
            **_tower(text, "text_cfg", model["quick_gelu"], heads=text["heads"]),
            **_texts(text),
            "projection_dim": model["embed_dim"],
            "pad_token_id": text["pad_id"],
            "eos_token_id": text["eos_id"] if pools_at_end_token else LARGEST_POOLED,
        },
        projection_dim=model["embed_dim"],
    )


def _siglip(model, text, trunk: Trunk) -> PreTrainedConfig:
    tower = {
        "hidden_size": trunk.width,
        "num_hidden_layers": trunk.layers,
        "num_attention_heads": trunk.heads,
        "intermediate_size": trunk.intermediate_size,
        "image_size": trunk.image_size,
        "patch_size": trunk.patch_size,
        "hidden_act": trunk.hidden_act,
        "layer_norm_eps": 1e-6,
    }
    own = _tower(text, "text_cfg", model["quick_gelu"], heads=text["heads"])  # timm never has QuickGELU
    texts = {**_texts(text), "bos_token_id": None, "eos_token_id": SIGLIP_END, "projection_size": trunk.width}
    return SiglipConfig(vision_config=tower, text_config={**own, **texts})


def _texts(text) -> dict[str, Any]:
    return {
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "bos_token_id": OPENAI_START if text["vocab_size"] > OPENAI_START else None,
    }


def _tower(section, where: str, quick_gelu: bool, heads: int) -> dict[str, Any]:
    width = section["width"]
    if heads < 1 or width % heads:
        raise ValueError(f"{where}.width {width} cannot be split into {heads} attention heads.")
    gelu = TANH if (section["act_kwargs"] or {}).get("approximate") == "tanh" else "gelu"
    return {
        "hidden_size": width,
        "num_hidden_layers": section["layers"],
        "num_attention_heads": heads,
        "intermediate_size": int(width * section["mlp_ratio"]),
        "hidden_act": "quick_gelu" if quick_gelu else gelu,
        "layer_norm_eps": (section["norm_kwargs"] or {}).get("eps", DEFAULT_EPS),
    }


def _side(size) -> int | None:
    """Returns the side of a square, or `None` for another rectangle."""
    if isinstance(size, (list, tuple)):
        return size[0] if size[0] == size[1] else None
    return size
