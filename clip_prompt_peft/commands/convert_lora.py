"""The files of CLIP-LoRA's authors, for the command `convert`: a LoRA of peft is made of one.

Such a file `lora_weights.pt` holds `weights`, the matrices A and B by layer and projection, and `metadata`. Its
`layer_0`, `layer_1`, ... count the layers that have LoRA, those of the text tower first. Which layers of the towers
they are follows from the metadata and from the numbers of layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import product
from typing import NoReturn

import torch
from peft import LoraConfig
from torch import nn

from ..towers import find_towers
from ..training.configs import clip_lora_config
from ..tuner.files import check_values


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}  # in the metadata, and in the file
OURS = {"proj": "out_proj"}
MATRICES = {"w_lora_A": "lora_A", "w_lora_B": "lora_B"}
ENCODERS = {"text": ("text",), "vision": ("vision",), "both": ("text", "vision")}
METADATA = ("r", "alpha", "encoder", "params", "position")
# The share of a tower's layers from its first to its last, and the number of its last layers.
SHARES = {
    "bottom": (0, 3),
    "mid": (1, 3),
    "up": (2, 3),
    "half-bottom": (0, 2),
    "half-up": (1, 2),
    "all": (0, 1),
}
LAST = {"top": 1, "top1": 1, "top2": 2, "top3": 3}
# The authors' code has tables of layers for towers of 12 and 24 layers only. In its earlier versions the one for 24
# had the numbers of that for 12, and 21 layers for "all".
NUM_LAYERS, NUM_LAYERS_OF_LARGE, ALL_OF_EARLIER_LARGE = 12, 24, 21


def is_lora_file(checkpoint: object) -> bool:
    """Returns whether the content of a file has the layout of CLIP-LoRA's."""
    return isinstance(checkpoint, dict) and "state_dict" not in checkpoint and "weights" in checkpoint


def check_metadata(checkpoint: dict, path: str) -> dict:
    """Returns the metadata of the file.

    Raises:
        ValueError: If there are none, one is missing, or one has a value that the authors' code does not give it.
    """

    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"{path!r} is not converted: its metadata {problem}.")

    metadata = checkpoint.get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"{path!r} holds weights, but no metadata ({', '.join(METADATA)}) that say what they are of.")
    missing = [name for name in METADATA if name not in metadata]
    if missing:
        refuse(f"lack {', '.join(missing)}, so where the weights belong is not known")
    r, alpha, params = metadata["r"], metadata["alpha"], metadata["params"]
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        refuse(f"name the rank r={r!r}, not a whole number of 1 or more")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        refuse(f"name alpha={alpha!r}, not a positive number")
    for name, known in (("encoder", ENCODERS), ("position", {**SHARES, **LAST})):
        value = metadata[name]
        if not isinstance(value, str) or value not in known:
            refuse(f"name the {name} {value!r}, not one of {', '.join(known)}")
    if not isinstance(params, (list, tuple)) or not params or not all(name in (*PROJECTIONS,) for name in params):
        refuse(f"name the params {params!r}, not a list of {', '.join(PROJECTIONS)}")
    return metadata


def layers_of(position: str, num_layers: int) -> list[range]:
    """Returns the layers that a position can mean in a tower, the most likely first. They differ in their number."""
    found = [_layers_of(position, num_layers)]
    if num_layers == NUM_LAYERS_OF_LARGE and position in SHARES:
        found.append(range(ALL_OF_EARLIER_LARGE) if position == "all" else _layers_of(position, NUM_LAYERS))
    return found


def _layers_of(position: str, num_layers: int) -> range:
    if position in LAST:
        return range(max(0, num_layers - LAST[position]), num_layers)
    index, parts = SHARES[position]
    number = math.ceil(num_layers / parts)
    first = index * (num_layers - number) // max(1, parts - 1)
    return range(first, first + number)


def read_lora(
    checkpoint: dict, metadata: Mapping, base: nn.Module, path: str
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """
    Returns the configuration of the LoRA in a file, and its tensors by their names in the model.

    Args:
        checkpoint (`dict`):
            The content of the file.
        metadata (`Mapping`):
            Its metadata, from [`check_metadata`].
        base (`nn.Module`):
            The CLIP.
        path (`str`):
            The file, for error messages.

    Raises:
        ValueError: If the weights are not those that the metadata and the CLIP ask for.
    """
    layers = lora_layers(checkpoint, metadata, base, path)
    tensors = lora_tensors(checkpoint, metadata, layers, path)
    names = "|".join(dict.fromkeys(OURS.get(name, name) for name in (PROJECTIONS[key] for key in metadata["params"])))
    places = "|".join(layer.replace(".", r"\.") for layer in layers)
    fields = {"r": metadata["r"], "lora_alpha": metadata["alpha"]}
    return clip_lora_config(base, target_modules=rf"({places})\.self_attn\.({names})", **fields), tensors


def lora_layers(checkpoint: dict, metadata: Mapping, base: nn.Module, path: str) -> list[str]:
    """Returns the path in the model of each layer in the file, in their order.

    Raises:
        ValueError: If the file has another number of layers than its metadata and the model ask for.
    """
    towers = {kind: find_towers(base, kind)[0].layer_keys for kind in ENCODERS[metadata["encoder"]]}
    position, weights = metadata["position"], checkpoint["weights"]
    names = [f"layer_{i}" for i in range(len(weights))] if isinstance(weights, dict) else None
    if not names or set(weights) != set(names):
        found = sorted(map(str, weights))[:5] if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{path!r} holds no weights of layer_0, layer_1, ..., but {found}.")
    choices = [[(kind, layers) for layers in layers_of(position, len(keys))] for kind, keys in towers.items()]
    for chosen in product(*choices):
        if sum(len(layers) for _, layers in chosen) == len(names):
            _warn_of_other_depths(position, towers, dict(chosen))
            return [towers[kind][i] for kind, layers in chosen for i in layers]
    wanted = " and ".join(
        f"{len(layers_of(position, len(keys))[0])} of {len(keys)} {kind} layers" for kind, keys in towers.items()
    )
    raise ValueError(
        f"{path!r} holds LoRA for {len(names)} layers, but the position {position!r} with the encoder "
        f"{metadata['encoder']!r} is {wanted} of the base model; name the CLIP that it was trained on."
    )


def _warn_of_other_depths(position: str, towers: Mapping[str, list[str]], chosen: Mapping[str, range]) -> None:
    for kind, layers in chosen.items():
        number = len(towers[kind])
        if position != "all" and number not in (NUM_LAYERS, NUM_LAYERS_OF_LARGE):
            warnings.warn(
                f"The authors' code has no table for a {kind} tower of {number} layers; the position {position!r} is "
                f"taken for the layers {layers.start} to {layers.stop - 1}, counted from 0.",
                stacklevel=2,
            )


def lora_tensors(checkpoint: dict, metadata: Mapping, layers: list[str], path: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of the file by their names in the model.

    Raises:
        ValueError: If projections or matrices are missing, there are others, or values are not finite.
    """
    projections = {PROJECTIONS[name] for name in metadata["params"]}
    tensors = {}
    for i, layer in enumerate(layers):
        of_layer = checkpoint["weights"][f"layer_{i}"]
        if not isinstance(of_layer, dict) or set(of_layer) != projections:
            found = sorted(map(str, of_layer)) if isinstance(of_layer, dict) else type(of_layer).__name__
            raise ValueError(f"{path!r} must hold {sorted(projections)} in 'layer_{i}', by its metadata; got {found}.")
        for projection, matrices in of_layer.items():
            place = f"'layer_{i}', {projection!r}"
            if not isinstance(matrices, dict) or set(matrices) != set(MATRICES):
                raise ValueError(f"{path!r} must hold {' and '.join(MATRICES)} in {place}, and nothing else.")
            if not all(torch.is_tensor(matrix) for matrix in matrices.values()):
                raise ValueError(f"{path!r} holds something else than tensors in {place}.")
            for name, matrix in matrices.items():
                key = f"{layer}.self_attn.{OURS.get(projection, projection)}.{MATRICES[name]}.default.weight"
                tensors[key] = matrix
    check_values(tensors)
    return {key: tensor.float() for key, tensor in tensors.items()}
