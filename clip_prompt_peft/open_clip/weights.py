"""From the tensors of an open_clip checkpoint to those of the equal model in transformers."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import SiglipConfig

from ..file_contents import foreign_content
from .config import OpenClipConfig


logger = logging.getLogger(__name__)
ADVICE = "download or save the checkpoint again"


# Reading


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint file, without running code that a pickle may hold.

    Args:
        path (`str`):
            A file of safetensors, or one that torch saved, with the tensors by name or in an entry `state_dict`.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors of floating point numbers.
    """
    tensors = _read_safetensors(path) if path.endswith(".safetensors") else _read_pickle(path)
    if not tensors:
        raise ValueError(f"{path!r} holds no tensors; {ADVICE}.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path!r} holds {name!r}, a {type(tensor).__name__} and no tensor; {ADVICE}.")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(
                f"{path!r} holds {name!r} as {tensor.dtype}, {tensor.layout}, which is no plain tensor of floating "
                f"point numbers; {ADVICE}."
            )
    if all(name.startswith("module.") for name in tensors):  # of a training in several processes
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        reason = foreign_content(path) or f"it is damaged ({error}); {ADVICE}"
        raise ValueError(f"{path!r} is no file of safetensors: {reason}.") from error


def _read_pickle(path: str) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path!r} is not read: a pickle can run code when it is opened, and this one holds more than tensors, or "
            "is damaged. Ask for the checkpoint as open_clip_model.safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"it is damaged ({type(error).__name__}: {error}); {ADVICE}"
        raise ValueError(f"{path!r} is no checkpoint of torch: {reason}.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        others = sorted(map(str, content.keys() - {"state_dict"}))
        if others:
            logger.warning("Of %r only 'state_dict' is used, and not %s.", path, ", ".join(others))
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds a {type(content).__name__}, and no tensors by name; {ADVICE}.")
    return content


class Tensors:
    """
    The tensors of a checkpoint, taken one after the other by name.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            The tensors by open_clip's names.
        path (`str`):
            The file, for error messages.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: str) -> None:
        self.left = dict(tensors)
        self.path = path

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Returns a tensor. Raises `ValueError` if there is none, or if it has another shape."""
        if name not in self.left:
            raise ValueError(f"{self.path!r} lacks {name!r} {shape}, which its configuration asks for; {ADVICE}.")
        tensor = self.left.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.path!r} holds {name!r} of shape {tuple(tensor.shape)}, where its configuration asks for "
                f"{shape}."
            )
        return tensor

    def take_number(self, name: str) -> torch.Tensor:
        """Returns a tensor of one number, whatever its shape is, as (1,)."""
        if name in self.left and self.left[name].numel() == 1:
            self.left[name] = self.left[name].reshape(1)
        return self.take(name, 1)

    def finish(self) -> None:
        """Raises `ValueError` if tensors are left that were not taken."""
        if self.left:
            name, more = min(self.left), len(self.left) - 1
            raise ValueError(
                f"{self.path!r} holds {name!r}{f' and {more} more tensors' if more else ''}, which its configuration "
                "has no place for."
            )


# Converting


@dataclass(frozen=True)
class BlockNames:
    """What a library calls the parts of a block, and whether it scales what the block adds."""

    prefix: str
    norms: tuple[str, str]
    qkv: tuple[str, str]  # weight and bias
    out: str
    mlp: tuple[str, str]
    scales: tuple[str, str] | None = None


def own_blocks(prefix: str, has_scales: bool) -> BlockNames:
    scales = ("ls_1.gamma", "ls_2.gamma") if has_scales else None
    qkv = ("attn.in_proj_weight", "attn.in_proj_bias")
    return BlockNames(prefix, ("ln_1", "ln_2"), qkv, "attn.out_proj", ("mlp.c_fc", "mlp.c_proj"), scales)


def timm_blocks(prefix: str) -> BlockNames:
    qkv = ("attn.qkv.weight", "attn.qkv.bias")
    return BlockNames(prefix, ("norm1", "norm2"), qkv, "attn.proj", ("mlp.fc1", "mlp.fc2"))


def convert(config: OpenClipConfig, tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of the equal model in transformers, by its names.

    Args:
        config (`OpenClipConfig`):
            The configuration.
        tensors (`Mapping[str, torch.Tensor]`):
            The tensors by open_clip's names.
        path (`str`):
            The file that they are from, for error messages.

    Raises:
        ValueError: If a tensor is missing, has another shape, or has no place. The message names the first.
    """
    source = Tensors(tensors, path)
    is_siglip = isinstance(config.transformers, SiglipConfig)
    image_tower = _siglip_image_tower if is_siglip else _clip_image_tower
    text_head = _siglip_head if is_siglip else _clip_projection
    result = {**image_tower(config, source), **_text_tower(config, source, text_head)}
    logit_scale = source.take_number("logit_scale")
    if is_siglip:
        has_bias = config.model["init_logit_bias"] is not None
        result["logit_scale"] = logit_scale
        result["logit_bias"] = source.take_number("logit_bias") if has_bias else torch.zeros_like(logit_scale)
    else:
        result["logit_scale"] = logit_scale.reshape(())
    source.finish()
    return result


def _blocks(source: Tensors, names: BlockNames, target: str, tower) -> dict[str, torch.Tensor]:
    width, hidden = tower.hidden_size, tower.intermediate_size
    result = {}
    for i in range(tower.num_hidden_layers):
        theirs, ours = f"{names.prefix}.{i}", f"{target}.encoder.layers.{i}"
        for norm, our_norm in zip(names.norms, ("layer_norm1", "layer_norm2")):
            result |= _both(source, f"{theirs}.{norm}", f"{ours}.{our_norm}", (width,))
        for kind, name, shape in (("weight", names.qkv[0], (3 * width, width)), ("bias", names.qkv[1], (3 * width,))):
            parts = source.take(f"{theirs}.{name}", *shape).chunk(3)
            result |= {f"{ours}.self_attn.{part}_proj.{kind}": x.clone() for part, x in zip("qkv", parts)}
        for part, our_part, scale, shape in (
            (names.out, "self_attn.out_proj", 0, (width, width)),
            (names.mlp[0], "mlp.fc1", None, (hidden, width)),
            (names.mlp[1], "mlp.fc2", 1, (width, hidden)),
        ):
            linear = _both(source, f"{theirs}.{part}", f"{ours}.{our_part}", shape)
            if names.scales and scale is not None:
                gamma = source.take(f"{theirs}.{names.scales[scale]}", width)
                linear = {name: _scaled(tensor, gamma) for name, tensor in linear.items()}
            result |= linear
    return result


def _both(source: Tensors, theirs: str, ours: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Takes weight and bias."""
    weight, bias = source.take(f"{theirs}.weight", *shape), source.take(f"{theirs}.bias", shape[0])
    return {f"{ours}.weight": weight, f"{ours}.bias": bias}


def _scaled(tensor: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Multiplies what a linear layer returns. The block adds `gamma * (W x + b)`, and transformers has no gamma."""
    gamma = gamma.double().reshape(-1, *[1] * (tensor.ndim - 1))
    return (gamma * tensor.double()).to(tensor.dtype)


def _clip_image_tower(config: OpenClipConfig, source: Tensors) -> dict[str, torch.Tensor]:
    tower = config.transformers.vision_config
    width, patch, target = tower.hidden_size, tower.patch_size, "vision_model"
    num_positions = (tower.image_size // patch) ** 2 + 1
    blocks = own_blocks("visual.transformer.resblocks", config.vision["ls_init_value"] is not None)
    return {
        f"{target}.embeddings.class_embedding": source.take("visual.class_embedding", width),
        f"{target}.embeddings.patch_embedding.weight": source.take("visual.conv1.weight", width, 3, patch, patch),
        f"{target}.embeddings.position_embedding.weight": source.take(
            "visual.positional_embedding", num_positions, width
        ),
        **_both(source, "visual.ln_pre", f"{target}.pre_layrnorm", (width,)),
        **_blocks(source, blocks, target, tower),
        **_both(source, "visual.ln_post", f"{target}.post_layernorm", (width,)),
        "visual_projection.weight": source.take("visual.proj", width, config.model["embed_dim"]).T.contiguous(),
    }


def _siglip_image_tower(config: OpenClipConfig, source: Tensors) -> dict[str, torch.Tensor]:
    tower = config.transformers.vision_config
    width, hidden, patch = tower.hidden_size, tower.intermediate_size, tower.patch_size
    theirs, target, pool = "visual.trunk", "vision_model", "visual.trunk.attn_pool"
    num_positions = (tower.image_size // patch) ** 2
    positions = source.take(f"{theirs}.pos_embed", 1, num_positions, width)
    query, keys = (_both(source, f"{pool}.{name}", name, (n * width, width)) for name, n in (("q", 1), ("kv", 2)))
    return {
        **_both(
            source, f"{theirs}.patch_embed.proj", f"{target}.embeddings.patch_embedding", (width, 3, patch, patch)
        ),
        f"{target}.embeddings.position_embedding.weight": positions[0],
        **_blocks(source, timm_blocks(f"{theirs}.blocks"), target, tower),
        **_both(source, f"{theirs}.norm", f"{target}.post_layernorm", (width,)),
        f"{target}.head.probe": source.take(f"{pool}.latent", 1, 1, width),
        f"{target}.head.attention.in_proj_weight": torch.cat([query["q.weight"], keys["kv.weight"]]),
        f"{target}.head.attention.in_proj_bias": torch.cat([query["q.bias"], keys["kv.bias"]]),
        **_both(source, f"{pool}.proj", f"{target}.head.attention.out_proj", (width, width)),
        **_both(source, f"{pool}.norm", f"{target}.head.layernorm", (width,)),
        **_both(source, f"{pool}.mlp.fc1", f"{target}.head.mlp.fc1", (hidden, width)),
        **_both(source, f"{pool}.mlp.fc2", f"{target}.head.mlp.fc2", (width, hidden)),
    }


Head = Callable[[OpenClipConfig, torch.Tensor | None, torch.Tensor | None, torch.Tensor, str], dict[str, torch.Tensor]]


def _text_tower(config: OpenClipConfig, source: Tensors, head: Head) -> dict[str, torch.Tensor]:
    tower = config.transformers.text_config
    width, out, target = tower.hidden_size, config.model["embed_dim"], "text_model"
    theirs = "text." if any(name.startswith("text.") for name in source.left) else ""
    blocks = own_blocks(f"{theirs}transformer.resblocks", config.text["ls_init_value"] is not None)
    embeddings = f"{target}.embeddings"
    result = {
        f"{embeddings}.token_embedding.weight": source.take(
            f"{theirs}token_embedding.weight", tower.vocab_size, width
        ),
        f"{embeddings}.position_embedding.weight": source.take(
            f"{theirs}positional_embedding", tower.max_position_embeddings, width
        ),
        **_blocks(source, blocks, target, tower),
        **_both(source, f"{theirs}ln_final", f"{target}.final_layer_norm", (width,)),
    }
    weight = bias = None  # the weight as of a linear layer, (out, width)
    if config.text["proj_type"] != "none" and config.text["proj_bias"]:
        weight = source.take(f"{theirs}text_projection.weight", out, width)
        bias = source.take(f"{theirs}text_projection.bias", out)
    elif config.text["proj_type"] != "none":
        weight = source.take(f"{theirs}text_projection", width, out).T.contiguous()
    norm_bias = result[f"{target}.final_layer_norm.bias"]
    return {**result, **head(config, weight, bias, norm_bias, source.path)}


def _siglip_head(config, weight, bias, norm_bias, path) -> dict[str, torch.Tensor]:
    weight = _identity(norm_bias) if weight is None else weight
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return {"text_model.head.weight": weight, "text_model.head.bias": bias}


def _clip_projection(config, weight, bias, norm_bias, path) -> dict[str, torch.Tensor]:
    weight = _identity(norm_bias) if weight is None else weight
    result = {"text_projection.weight": weight}
    if bias is not None:
        result["text_model.final_layer_norm.bias"] = _with_bias_of_projection(norm_bias, weight, bias, path)
    return result


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _with_bias_of_projection(norm_bias, weight, bias, path) -> torch.Tensor:
    """Returns the bias of the last LayerNorm with that of the projection in it, which has none in transformers.

    The projection of `x + d` is that of `x` plus `bias` where `W d = bias`. There is such a `d` for every bias if the
    rows of `W` are independent.
    """
    if weight.is_meta:
        return norm_bias
    shift = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution[:, 0]
    left = (weight.double() @ shift - bias.double()).abs().max()
    if left > 1e-7 * max(1.0, float(bias.abs().max())):
        raise ValueError(
            f"{path!r} has a bias of the text projection that CLIPModel has no place for: it is no image of the "
            f"projection ({left:.1e} is left)."
        )
    return (norm_bias.double() + shift).to(norm_bias.dtype)
