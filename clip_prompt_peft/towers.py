"""The parts of a CLIP or a related dual encoder: its two sides, their embeddings and layers, and the adapters in them.

Class names and module paths differ between families and transformers versions; the structure does not. A dual encoder
has a `text_model` and a `vision_model`, with or without projections. Text embeddings hold a token table and a position
table. A tower is a module with `embeddings` and with `encoder.layers` (or `encoder.layer`, as in BERT).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


TOKEN_TABLES = ("token_embedding", "word_embeddings")  # the names in CLIP and in BERT
POSITION_TABLES = ("position_embedding", "position_embeddings")
PATCH_PROJECTIONS = ("patch_embedding", "patch_embed", "patch_embeddings")  # in CLIP, AIMv2 and GroupViT
FINAL_NORMS = ("final_layer_norm", "rms_norm")  # in CLIP and in AIMv2
TRANSFORMERS_HOOKS = "transformers.utils.output_capturing"
LAYER_LISTS = ("layers", "layer")
ATTENTION_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))  # the names in CLIP and in BERT
ADAPTER_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the second wraps the modules of `modules_to_save`
WRAPPED = ("base_layer", "original_module")  # the names that adapters give to the module that they wrap


def text_side(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules that compute text embeddings."""
    return _children(model, "text_model", "text_projection")


def image_side(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules that compute image embeddings."""
    return _children(model, "vision_model", "visual_projection")


def embed_width(config) -> int | None:
    """Returns E, the width of image and text embeddings, or `None` if the config has no such field."""
    width = getattr(config, "projection_dim", None)
    return getattr(getattr(config, "text_config", None), "projection_size", None) if width is None else width


def text_embeddings_of(text_model: nn.Module) -> nn.Module:
    """Returns the embeddings of a text tower. In AltCLIP the tower is a head on top of the model that holds them."""
    return text_model.base_model.embeddings


def token_table_name(embeddings: nn.Module | None) -> str | None:
    """Returns the attribute name of the token table (V, D) of text embeddings, or `None` if there is none."""
    return _table_name(embeddings, TOKEN_TABLES)


def position_table_name(embeddings: nn.Module | None) -> str | None:
    """Returns the attribute name of the position table of embeddings, or `None` if there is none."""
    return _table_name(embeddings, POSITION_TABLES)


def is_text_embeddings(module: nn.Module | None, token_tables: tuple[str, ...] = TOKEN_TABLES) -> bool:
    """Returns whether `module` holds a token table with one of these names, and a position table."""
    return token_table_name(module) in token_tables and position_table_name(module) is not None


def is_vision_embeddings(module: nn.Module | None) -> bool:
    """Returns whether `module` holds a patch embedding, and a position table or what stands for one.

    AIMv2 of native resolution computes its positions. GroupViT has one tensor of them, as many other image towers
    have, of which only those in front of stages are known here.
    """
    if isinstance(getattr(module, "patch_embedding", None), nn.Module):
        return isinstance(getattr(module, "position_embedding", None), nn.Module)
    if isinstance(getattr(module, "patch_embed", None), nn.Module):
        is_native = getattr(getattr(module, "config", None), "is_native", False)
        return is_native is True or isinstance(getattr(module, "position_embedding", None), nn.Module)
    config = getattr(module, "config", None)
    return isinstance(getattr(module, "patch_embeddings", None), nn.Module) and hasattr(config, "num_group_tokens")


def patch_projection(embeddings: nn.Module) -> nn.Module:
    """Returns the layer that makes vectors of the patches of an image."""
    patches = next(part for name in PATCH_PROJECTIONS if (part := getattr(embeddings, name, None)) is not None)
    return unwrapped(getattr(patches, "projection", patches))


def takes_patches(embeddings: nn.Module) -> bool:
    """Returns whether image embeddings take patches and a mask of them (NaFlex) instead of images of a fixed size."""
    return isinstance(patch_projection(embeddings), nn.Linear)


def final_norm_of(text_model: nn.Module) -> nn.Module:
    """Returns the normalization behind the last layer of a text tower."""
    return next(norm for name in FINAL_NORMS if (norm := getattr(text_model, name, None)) is not None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside of the adapters of other methods, such as LoRA on a token table."""
    while isinstance(module, ADAPTER_LAYERS):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def num_rows(table: nn.Module) -> int:
    """Returns the number of rows of an embedding table."""
    return unwrapped(table).num_embeddings


def first_position_row(embeddings: nn.Module) -> int:
    """Returns the row of the position table for the first token. RoBERTa has rows for padding before it."""
    padding_row = getattr(_position_table(embeddings), "padding_idx", getattr(embeddings, "padding_idx", None))
    return 0 if padding_row is None else padding_row + 1


def num_positions(embeddings: nn.Module) -> int:
    """Returns the largest number of tokens of a text."""
    return num_rows(_position_table(embeddings)) - first_position_row(embeddings)


@dataclass(frozen=True)
class Tower:
    """
    A text or image tower inside a model.

    Attributes:
        embeddings_key: The path of its embeddings.
        layer_keys: The paths of its encoder layers.
        like: An empty tensor (0, D), which gives the hidden size and dtype of the embeddings, and their device.
        has_stages: Whether the layers belong to stages, between which tokens are put together, as in GroupViT.
    """

    embeddings_key: str
    layer_keys: list[str]
    like: torch.Tensor
    has_stages: bool = False


def find_towers(model: nn.Module, kind: str) -> list[Tower]:
    """Finds all towers of a kind, `"text"` or `"vision"`, in a model."""
    if kind == "text":
        # A BERT is the text tower of a dual encoder only if there is an image tower beside it.
        names = TOKEN_TABLES if any(map(is_vision_embeddings, model.modules())) else TOKEN_TABLES[:1]
        is_embeddings, like = (lambda module: is_text_embeddings(module, names)), _like_tokens
    else:
        is_embeddings, like = is_vision_embeddings, _like_patches
    return [
        _tower(model, key, like(module))
        for key, module in model.named_modules()
        # A tuner layer has the same tables as the module that it wraps; only one of them counts.
        if is_embeddings(module) and not key.endswith("base_layer")
    ]


def num_tower_layers(model: nn.Module, kind: str) -> int | None:
    """Returns the smallest number of encoder layers among the towers of a kind, or `None` if there is no tower."""
    return min((len(tower.layer_keys) for tower in find_towers(model, kind)), default=None)


def attention_inputs(model: nn.Module) -> list[str]:
    """
    Returns the names of the query, key and value projections in the encoder layers of both towers.

    They differ between families, and between the towers of some.

    Raises:
        ValueError: If there is a tower without such layers, or a layer without them: what is put into the others would
            change a part of the model only.
    """
    found: list[str] = []
    for kind in ("text", "vision"):
        layers = [model.get_submodule(key) for tower in find_towers(model, kind) for key in tower.layer_keys]
        held = [{name.rpartition(".")[2] for name, _ in layer.named_modules()} for layer in layers]
        names = next((names for names in ATTENTION_INPUTS if held and all(set(names) <= of for of in held)), None)
        if names is None:
            known = " or ".join(", ".join(names) for names in ATTENTION_INPUTS)
            raise ValueError(
                f"The query, key and value projections of all layers of both towers are needed, but the {kind} tower "
                f"of {type(model).__name__} has {'layers' if held else 'no layers'} without {known}."
            )
        found += [name for name in names if name not in found]
    return found


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a LayerNorm, or one of its kin without a mean (RMSNorm)."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("RMSNorm")


def block_layer_norms(model: nn.Module) -> list[str]:
    """
    Returns the paths of the LayerNorms in the encoder layers of both towers; those before and behind them are others.

    Raises:
        ValueError: If there is a tower without such layers.
    """
    found: list[str] = []
    for kind in ("text", "vision"):
        layers = [key for tower in find_towers(model, kind) for key in tower.layer_keys]
        paths = [
            f"{key}.{name}"
            for key in layers
            for name, module in model.get_submodule(key).named_modules()
            if is_norm(unwrapped(module)) and not {"base_layer", "ln_tuning_layers"} & set(name.split("."))
        ]
        if not paths:
            raise ValueError(f"The {kind} tower of {type(model).__name__} has no LayerNorms in its layers.")
        found += paths
    return found


def outside_of_layers(model: nn.Module, names: list[str]) -> list[str]:
    """Returns the paths of modules with one of these names that are in no encoder layer, such as a pooling."""
    layers = tuple(
        f"{key}." for kind in ("text", "vision") for tower in find_towers(model, kind) for key in tower.layer_keys
    )
    return [key for key, _ in model.named_modules() if key.rpartition(".")[2] in names and not key.startswith(layers)]


def adapter_settings(modules: Iterable[nn.Module]) -> list[dict[str, str]]:
    """Returns the plain values of each adapter layer: which adapter is active, disabled or merged, its scaling, ..."""
    layers = [module for module in modules if isinstance(module, ADAPTER_LAYERS)]
    return [{name: repr(value) for name, value in vars(layer).items() if _is_plain(value)} for layer in layers]


def has_adapters(modules: Iterable[nn.Module]) -> bool:
    """Returns whether there is an adapter layer in one of the modules."""
    return any(isinstance(part, ADAPTER_LAYERS) for module in modules for part in module.modules())


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the tensors that a tensor is made of: itself, or the parts of one that is packed by a quantization."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from inner_tensors(getattr(tensor, name))


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a linear layer or a table holds its weight in another form than as numbers of 16 bits or more.

    Libraries of quantization keep other numbers of other names in place of the weight, or a tensor of their own class.
    """
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features", "num_embeddings")]
    if isinstance(module, ADAPTER_LAYERS) or not any(isinstance(size, int) for size in sizes):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return hasattr(weight, "__tensor_flatten__") and not is_shared(weight)


def is_shared(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a part of one that several devices share."""
    return type(tensor).__module__.startswith("torch.distributed")


def trainable_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of the modules that require gradients."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def hooks_of(module: nn.Module) -> dict:
    """Returns the hooks that see, or change, the calls of a module: by a number that no other hook has.

    Those of transformers for `output_hidden_states` only look, and stay in the model after a call. They do not count.
    """
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    of_all = (_global_forward_pre_hooks, _global_forward_hooks, _global_backward_pre_hooks, _global_backward_hooks)
    hooks = {number: hook for group in (*own, *of_all) for number, hook in group.items()}
    return {n: hook for n, hook in hooks.items() if getattr(hook, "__module__", None) != TRANSFORMERS_HOOKS}


def is_intercepted(module: nn.Module) -> bool:
    """Returns whether hooks, or a `forward` of its own as accelerate sets it, take part in the calls of a module."""
    return "forward" in vars(module) or bool(hooks_of(module))


def drops_out(module: nn.Module) -> bool:
    """Returns whether a module is a dropout in effect, or hands a rate of dropout to a function, as attention does."""
    rates = (getattr(module, name, 0) for name in ("p", "dropout", "attention_dropout", "dropout_p"))
    return module.training and any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes. accelerate keeps offloaded weights elsewhere between calls."""
    device = next(module.parameters()).device
    offloaded = [part for part in module.modules() if has_offloaded_params(part)] if device.type == "meta" else []
    parts = [part for part in offloaded if next(part.parameters(recurse=False), None) is not None]
    if not parts:
        return device
    smallest = min(parts, key=lambda part: sum(tensor.numel() for tensor in part.parameters(recurse=False)))
    with align_module_device(smallest):
        return next(smallest.parameters(recurse=False)).device


def like_table(table: nn.Module) -> torch.Tensor:
    """Returns an empty tensor (0, D) of the width and dtype of an embedding table, on the device that it works on.

    Weights of a quantized table are of other shapes and types, or packed away; its dtype is the default one.
    """
    table = unwrapped(table)
    weight = dict(table.named_parameters(recurse=False)).get("weight")
    if weight is None:
        device = next((tensor.device for tensor in table.buffers()), torch.device("cpu"))
    else:
        device = execution_device(table)
    is_floating = weight is not None and weight.is_floating_point()
    dtype = weight.dtype if is_floating else torch.get_default_dtype()
    return torch.empty((0, table.embedding_dim), dtype=dtype, device=device)


def entry_of(tensors: nn.ParameterDict, name: str) -> torch.Tensor:
    """Returns a tensor of a `ParameterDict`, which accelerate does not load from where it is offloaded by itself."""
    if not tensors[name].is_meta:
        return tensors[name]
    with align_module_device(tensors):
        return tensors[name]


def with_modules_of(source: nn.Module, target_class: type[nn.Module]) -> nn.Module:
    """Creates a model of another class with the modules of `source`, without copying a weight."""
    with torch.device("meta"):  # these weights are dropped at once
        model = target_class(copy.copy(source.config))
    for name, module in source.named_children():
        setattr(model, name, module)
    for name, parameter in source.named_parameters(recurse=False):  # logit scale and bias
        setattr(model, name, parameter)
    for name in ("peft_config", "_hf_peft_config_loaded", "hf_device_map", "hub_settings"):  # of the modules
        if hasattr(source, name):
            setattr(model, name, getattr(source, name))
    model.training = source.training  # not train(), which would change the modules, too
    return model


def frozen_copy(module: nn.Module, known: dict | None = None) -> nn.Module:
    """Returns a module of the same parts that shares all weights, is frozen and in eval mode.

    Its parts can be replaced without changing those of `module`. No weight is copied.

    Args:
        module (`torch.nn.Module`):
            The module. Its hooks act on the copy, too.
        known (`dict`, *optional*):
            The copies by the id of what they are copies of, so that shared parts stay shared.
    """
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = copied = copy.copy(module)
    copied.training = False
    vars(copied).update(
        _parameters={name: _frozen(parameter, known) for name, parameter in module._parameters.items()},
        _buffers=dict(module._buffers),
        _modules={name: part and frozen_copy(part, known) for name, part in module._modules.items()},
    )
    return copied


def _frozen(parameter: nn.Parameter | None, known: dict) -> nn.Parameter | None:
    if parameter is None or not parameter.requires_grad:
        return parameter
    if id(parameter) not in known:
        known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return known[id(parameter)]


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Puts a model into eval mode for a while; afterwards every module is back in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:  # not eval(), with which classifiers read what a device has still to compute
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _children(model: nn.Module, *names: str) -> tuple[nn.Module, ...]:
    return tuple(part for name in names if (part := getattr(model, name, None)) is not None)


def _table_name(embeddings, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _is_table(unwrapped(getattr(embeddings, name, None)))), None)


def _is_table(module) -> bool:
    # not only nn.Embedding: libraries of quantization have their own classes
    sizes = (getattr(module, name, None) for name in ("num_embeddings", "embedding_dim"))
    return isinstance(module, nn.Module) and all(isinstance(size, int) for size in sizes)


def _position_table(embeddings: nn.Module) -> nn.Module:
    return unwrapped(getattr(embeddings, position_table_name(embeddings)))


def _like_tokens(embeddings: nn.Module) -> torch.Tensor:
    return like_table(getattr(embeddings, token_table_name(embeddings)))


def _like_patches(embeddings: nn.Module) -> torch.Tensor:
    """Returns an empty tensor (0, D) as [`like_table`] does, also where positions are in no table."""
    name = position_table_name(embeddings)
    if name is not None:
        return like_table(getattr(embeddings, name))
    projection = patch_projection(embeddings)
    width = getattr(projection, "out_channels", None) or projection.out_features
    return torch.empty((0, width), dtype=projection.weight.dtype, device=execution_device(projection))


def _tower(model: nn.Module, embeddings_key: str, like: torch.Tensor) -> Tower:
    path = embeddings_key.rpartition(".")[0]
    encoder = getattr(model.get_submodule(path), "encoder", None)
    prefix = f"{path}.encoder" if path else "encoder"
    stages = getattr(encoder, "stages", None)
    if stages is None:
        return Tower(embeddings_key, _layer_keys(encoder, prefix), like)
    keys = [key for i, stage in enumerate(stages) for key in _layer_keys(stage, f"{prefix}.stages.{i}")]
    return Tower(embeddings_key, keys, like, has_stages=True)


def _layer_keys(encoder: nn.Module | None, prefix: str) -> list[str]:
    name = next((name for name in LAYER_LISTS if getattr(encoder, name, None) is not None), None)
    return [] if name is None else [f"{prefix}.{name}.{i}" for i in range(len(getattr(encoder, name)))]


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
