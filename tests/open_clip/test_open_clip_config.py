"""open_clip's configurations: what becomes of each architecture, and which part is in the way of the others."""

import json
from collections import Counter

import pytest
from conftest import ROOT
from open_clip_cases import CASES, clip, recorded, refusals, siglip, table

from clip_prompt_peft import AutoModelForPromptClassification
from clip_prompt_peft.open_clip.config import UnsupportedOpenClipModel, read_config


def read(model_cfg, **preprocess_cfg):
    return read_config({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, "me/model")


IN_THE_WAY = {
    "CoCa's decoder": clip(multimodal_cfg={"layers": 2}),
    "a ResNet": clip({"layers": [3, 4, 6, 3], "patch_size": None}),
    "'eva02_base_patch16_clip_224' (an image tower of timm": clip({"timm_model_name": "eva02_base_patch16_clip_224"}),
    "'vit_base_patch16_siglip_gap_224' (an image tower": siglip()
    | {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_gap_224"}},
    "a projection of two layers": clip({"timm_model_name": "convnext_large", "timm_proj": "mlp"}),
    "vision_cfg.timm_proj 'linear' (a projection of images)": siglip()
    | {"vision_cfg": {"timm_model_name": "vit_tiny_patch8_siglip_gelu", "timm_pool": "map", "image_size": 24}},
    "text_cfg.hf_model_name 'roberta-base'": clip(text={"hf_model_name": "roberta-base"}),
    "vision_cfg.no_ln_pre": clip({"no_ln_pre": True}),
    "vision_cfg.pool_type 'avg'": clip({"pool_type": "avg"}),
    "vision_cfg.attentional_pool": clip({"attentional_pool": True}),
    "vision_cfg.qk_norm": clip({"qk_norm": True}),
    "text_cfg.scale_heads": clip(text={"scale_heads": True}),
    "vision_cfg.image_size [224, 448] (not a square)": clip({"image_size": [224, 448]}),
    "text_cfg.embed_cls": clip(text={"embed_cls": True}),
    "text_cfg.proj_type 'mlp'": clip(text={"proj_type": "mlp"}),
    "text_cfg.proj_type 'none' from width 32 to embed_dim 24": clip(text={"proj_type": "none"}),
    "text_cfg.pool_type 'last'": clip(text={"pool_type": "last"}),
    "text_cfg.no_causal_mask": clip(text={"no_causal_mask": True}),
    "init_logit_bias": clip(init_logit_bias=-10),
    "text_cfg.norm_kwargs": clip(text={"norm_kwargs": {"elementwise_affine": False}}),
    "vision_cfg.act_kwargs": clip({"act_kwargs": {"inplace": True}}),
    "a causal text tower beside an image tower of SigLIP": siglip(text={"no_causal_mask": False}),
    "text_cfg.pool_type 'first' beside": siglip(text={"pool_type": "first"}),
    "embed_dim 64 beside an image tower of width 32": siglip(embed_dim=64),
    "text_cfg.rope (a field that is not known here)": clip(text={"rope": True}),
}


@pytest.mark.parametrize("part", IN_THE_WAY)
def test_what_cannot_be_expressed_is_refused_with_the_part_and_with_what_works(part):
    with pytest.raises(UnsupportedOpenClipModel) as raised:
        read(IN_THE_WAY[part])
    assert part in str(raised.value) and "'me/model'" in str(raised.value)
    assert "What works: ViT image towers with a class token" in str(raised.value)


def test_all_parts_that_are_in_the_way_are_told_at_once():
    with pytest.raises(UnsupportedOpenClipModel) as raised:
        read(clip({"no_ln_pre": True, "pool_type": "avg"}, {"pool_type": "last", "no_causal_mask": True}))
    assert len(raised.value.parts) == 4


DAMAGED = {
    "there is no 'model_cfg'": {"embed_dim": 3},
    "embed_dim must be a whole number": {"model_cfg": clip(embed_dim="512")},
    "text_cfg must be an object": {"model_cfg": {"embed_dim": 3, "vision_cfg": {}}},
    "vision_cfg.width must be a whole number of 1 or more, got 0": {"model_cfg": clip({"width": 0})},
    "cannot be split into 5 attention heads": {"model_cfg": clip(text={"heads": 5})},
    "text_cfg.layers must be a number of layers, got 1.5": {"model_cfg": clip(text={"layers": 1.5})},
    "preprocess_cfg.mean must be a number or three": {"model_cfg": clip(), "preprocess_cfg": {"mean": [1, 2]}},
    "preprocess_cfg must be an object": {"model_cfg": clip(), "preprocess_cfg": [1]},
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_damaged_configuration_is_refused_with_the_field(reason):
    with pytest.raises(ValueError, match="configuration of 'me/model' is damaged") as raised:
        read_config(DAMAGED[reason], "me/model")
    assert reason in str(raised.value)


@pytest.mark.parametrize("setting", [{"mode": "RGBA"}, {"interpolation": "lanczos"}, {"resize_mode": "stretch"}])
def test_preprocessing_of_an_unknown_kind_is_refused(setting):
    with pytest.raises(UnsupportedOpenClipModel, match="preprocess_cfg"):
        read(clip(), **setting)


def test_a_file_that_is_no_json_is_refused_with_its_path(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("<!doctype html><html>")
    with pytest.raises(ValueError, match="it is a web page") as raised:
        AutoModelForPromptClassification.from_pretrained(tmp_path)
    assert "open_clip_config.json" in str(raised.value)


def test_nothing_more_is_read_of_a_model_that_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip({"no_ln_pre": True})}))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnsupportedOpenClipModel):
        AutoModelForPromptClassification.from_pretrained(tmp_path)


def test_timm_s_names_may_have_a_tag_of_weights():
    model_cfg = siglip()
    model_cfg["vision_cfg"]["timm_model_name"] += ".webli"
    assert read(model_cfg).transformers.model_type == "siglip"


def test_every_architecture_of_open_clip_was_mapped_or_refused_and_the_docs_say_which():
    recording = recorded("architectures.json")
    architectures = recording["architectures"]
    classes = Counter(one.get("class") for one in architectures.values())
    compared = [one for one in architectures.values() if "layers" in one]
    for one in compared:
        assert one["image"] < 1e-6 and one["text"] < 1e-6 and one["logits"] < 1e-4 and one["tuned"] < 1e-4
    docs = " ".join((ROOT / "docs" / "open_clip.md").read_text(encoding="utf-8").split())
    for said in (
        f"Of the {len(architectures)} architectures in the list of open_clip {recording['open_clip']}, "
        f"{classes.total() - classes[None]} map: {classes['CLIPModel']} become a `CLIPModel`, "
        f"{classes['MetaClip2Model']} a `MetaClip2Model`",
        f"and {classes['SiglipModel']} a `SiglipModel`. The other {classes[None]} are refused",
        f"for all {classes.total() - classes[None]}, at full size. Numbers of {len(compared)} of them were compared",
        f"{len(CASES)} tiny models",
        " ".join(table(architectures).split()),
        " ".join(refusals(architectures).split()),
    ):
        assert said in docs, said
