"""Some values of the base model, which tell another one of the same shape when an adapter is loaded.

An adapter names its base model, but a name can come to stand for other weights: another revision, another folder, a
model that was trained further. The sample holds one or a few values of every tensor, in float32, chosen by position.
They are compared with the tolerance of the coarser precision, so that a copy in bfloat16, in 8 bit, or in another file
is the same model.

What is noticed follows from that tolerance. Between float32 or float16 copies, a layer or a projection that was
changed by a thousandth of its values is. Against a bfloat16 copy it takes about a hundredth in a projection or a norm,
since bfloat16 rounds by up to 0.4 % itself, and a thousandth only where many tensors were changed. In 8 bit, less than
one step of the quantization is not seen.
"""

from __future__ import annotations

import base64
import binascii
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..towers import ADAPTER_LAYERS, WRAPPED, find_towers


NUM_VALUES = 384  # about as many in all; at least one of each tensor
MIN_OF_PART = 48  # of a part with few tensors, such as a projection, which may be trained alone
FIRST_ROWS = 256  # values are taken from these rows, so that rows appended to a table change nothing
SEGMENT = 128  # values around a sampled one, in which the steps of a quantized tensor are looked for
MIN_SEGMENT = 16
MAX_LEVELS = 1024  # 8 bits have 256 levels; a dequantized tensor that was rounded to half precision has some more
MIN_QUANTIZED = 0.3  # share of tensors; in a model that is not quantized a few seem to be, such as those of ones
SMALLEST = 1e-7  # half precision has no finer steps near 0
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly


def fingerprint_of(model: nn.Module) -> dict | None:
    """Returns the fingerprint of a model without its adapters, as it is saved; `None` if it has no values (meta)."""
    groups = _groups(model)
    per_tensor = max(1, NUM_VALUES // max(1, sum(map(len, groups.values()))))
    counts = {name: _num_samples(tensors, per_tensor) for name, tensors in groups.items()}
    values = {name: _sample(tensors, counts[name]) for name, tensors in groups.items()}
    if not any(sample.isfinite().any() for sample in values.values()):
        return None
    fingerprint = {"per_tensor": per_tensor, "values": {name: _encode(sample) for name, sample in values.items()}}
    steps = {name: _steps(tensors, counts[name]) for name, tensors in groups.items()}
    if torch.cat([*steps.values()]).gt(0).float().mean() < MIN_QUANTIZED:
        return fingerprint
    return {**fingerprint, "steps": {name: _encode(of_group) for name, of_group in steps.items()}}


def check_fingerprint(fingerprint: dict, model: nn.Module, adapter: str, base: str) -> None:
    """Warns (`UserWarning`) if the model is not the one that an adapter was trained on.

    Args:
        fingerprint (`dict`):
            The fingerprint in the adapter's configuration.
        model (`torch.nn.Module`):
            The model that the adapter is loaded into. Tensors that have no values here (on the meta device, packed in
            8 or 4 bit) or are not there (of a text tower alone) are not compared.
        adapter, base (`str`):
            The adapter, and the base model that it was trained on, for the message.

    Raises:
        ValueError: If the fingerprint is damaged.
    """
    per_tensor, recorded, steps = _decode(fingerprint)
    differing, compared = [], 0
    for name, tensors in _groups(model).items():
        before = recorded.get(name)
        if before is None:
            continue
        num_samples = len(before) // len(tensors)
        # per_tensor for all parts: as the first adapters had it
        if len(before) not in (len(tensors) * _num_samples(tensors, per_tensor), len(tensors) * per_tensor):
            differing.append(f"{name} has another number of layers or tensors")
            continue
        now = _sample(tensors, num_samples)
        tolerance = torch.maximum(_precision(before), _precision(now)) * before.abs() + SMALLEST
        known = before.isfinite() & now.isfinite()
        is_other = known & ((before - now).abs() > tolerance)
        if is_other.any():  # it may be quantized, here or there
            step = torch.maximum(_steps(tensors, num_samples), steps.get(name, torch.zeros_like(now)))
            is_other &= (before - now).abs() > tolerance + 1.01 * step
        compared += int(known.sum())
        if is_other.any():
            differing.append(f"{name} differs in {int(is_other.sum())}")
    if differing:
        own = getattr(model, "name_or_path", "") or "no name"
        warnings.warn(
            f"The adapter {adapter} was trained on other weights than those of this {type(model).__name__} ({own}): "
            f"of {compared} values that were compared, {', '.join(differing)}. Its predictions will be worse than "
            f"they were. Load the base model that it names, {base}, or train it again on this one.",
            UserWarning,
            stacklevel=2,
        )


def _groups(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Returns the tensors of each part (text tower, image tower, projections, scale), in the order of their names."""
    towers = find_towers(model, "text")
    root = towers[0].embeddings_key.rpartition(".")[0] if towers else ""
    prefix = root.partition("text_model")[0] if "text_model" in root else root and f"{root}."
    is_bare = "text_model" not in root  # a text tower alone
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _base_tensors(model):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            group = "text_model" if is_bare else name.partition(".")[0]
            groups.setdefault(group, {})[name.removeprefix("text_model.")] = tensor
    return {name: [tensors[key] for key in sorted(tensors)] for name, tensors in groups.items()}


def _base_tensors(module: nn.Module, prefix: str = "", in_adapter: bool = False) -> Iterator:
    """Yields the parameters that belong to no adapter, with the names that they have without adapters."""
    in_adapter = in_adapter or isinstance(module, ADAPTER_LAYERS)
    if not in_adapter:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, parameter.detach()
    for name, child in module.named_children():
        is_wrapped = in_adapter and name in WRAPPED
        yield from _base_tensors(child, prefix if is_wrapped else f"{prefix}{name}.", in_adapter and not is_wrapped)


def _num_samples(tensors: list[torch.Tensor], per_tensor: int) -> int:
    """Returns how many values of each tensor of a part are sampled."""
    return max(per_tensor, min(MIN_OF_PART // len(tensors), *(tensor.numel() for tensor in tensors)))


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def _positions(tensor: torch.Tensor, order: int, per_tensor: int) -> list[tuple[int, int]]:
    """Returns the rows and columns of the values that are sampled from the tensor with this place in the order."""
    num_columns = tensor[0].numel() if tensor.ndim > 1 else 1
    num_rows = min(FIRST_ROWS, tensor.numel() // num_columns) if tensor.ndim > 1 else tensor.numel()
    shares = [(order * per_tensor + i + 1) * GOLDEN_RATIO % 1 for i in range(per_tensor)]
    return [divmod(int(share * num_rows * num_columns), num_columns) for share in shares]


def _sample(tensors: list[torch.Tensor], per_tensor: int) -> torch.Tensor:
    """Returns (len(tensors) * per_tensor,) values; NaN where a tensor has none."""
    sample = torch.full((len(tensors), per_tensor), torch.nan)
    for order, tensor in enumerate(tensors):
        if _has_values(tensor):
            table = tensor.reshape(-1, tensor[0].numel()) if tensor.ndim > 1 else tensor.reshape(-1, 1)
            rows, columns = zip(*_positions(tensor, order, per_tensor))
            sample[order] = table[list(rows), list(columns)].float().cpu()
    return sample.flatten()


def _steps(tensors: list[torch.Tensor], per_tensor: int) -> torch.Tensor:
    """Returns the distance between neighboring levels around each sampled value; 0 unless the tensor is quantized."""
    segments, places = [], []
    for order, tensor in enumerate(tensors):
        if not _has_values(tensor):
            continue
        table = tensor.reshape(-1, tensor[0].numel()) if tensor.ndim > 1 else tensor.reshape(1, -1)
        for i, (row, column) in enumerate(_positions(tensor, order, per_tensor)):
            lines = (table[row], table[:, column]) if tensor.ndim > 1 else (table[0],)
            for line in lines:
                if len(line) >= MIN_SEGMENT:
                    line = line[:SEGMENT]
                    padded = torch.cat([line, line[-1:].expand(SEGMENT - len(line))]) if len(line) < SEGMENT else line
                    segments.append(padded.float().cpu())
                    places.append(order * per_tensor + i)
    steps = torch.zeros(len(tensors) * per_tensor)
    if not segments:
        return steps
    ordered = torch.stack(segments).sort(dim=1).values  # (S, SEGMENT)
    gaps = ordered.diff(dim=1)
    smallest = gaps.masked_fill(gaps <= 0, torch.inf).min(dim=1).values  # (S,)
    is_quantized = smallest * MAX_LEVELS >= ordered[:, -1] - ordered[:, 0]
    smallest = torch.where(is_quantized & smallest.isfinite(), smallest, 0.0)
    return steps.scatter_reduce(0, torch.tensor(places), smallest, "amax")


def _precision(values: torch.Tensor) -> torch.Tensor:
    """Returns the relative precision of each value, by the coarsest format that holds it."""
    precision = torch.full_like(values, torch.finfo(torch.float32).eps)
    for dtype in (torch.float16, torch.bfloat16):
        precision[values.to(dtype).float() == values] = torch.finfo(dtype).eps
    return precision


def _encode(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _decode(fingerprint: dict) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    try:
        tensors = []
        for field in ("values", "steps"):
            encoded = fingerprint.get(field, {}).items()
            decoded = {name: bytearray(base64.b64decode(text, validate=True)) for name, text in encoded}
            tensors.append(
                {name: torch.frombuffer(data, dtype=torch.float32) for name, data in decoded.items() if data}
            )
        per_tensor = fingerprint["per_tensor"]
        if not isinstance(per_tensor, int) or not 1 <= per_tensor <= NUM_VALUES:
            raise ValueError(f"per_tensor is {per_tensor!r}")
        values, steps = tensors
        if any(len(steps[name]) != len(values.get(name, ())) for name in steps):
            raise ValueError("values and steps differ in number")
        return per_tensor, values, steps
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(
            f"base_model_fingerprint is damaged ({type(error).__name__}: {error}); download or save the adapter again."
        ) from error
