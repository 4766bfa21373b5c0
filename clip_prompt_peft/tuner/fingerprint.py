"""Some values of the base model, which tell another one of the same shape when an adapter is loaded.

An adapter names its base model, but a name can come to stand for other weights: another revision, another folder, a
model that was trained further. The sample holds one or a few values of every tensor, and some more of the tables of
tokens and positions, in float32, chosen by position. They are compared with the tolerance of the coarser precision, so
that a copy in bfloat16, in 8 bit, or in another file is the same model.

What is noticed follows from that tolerance. Between float32 or float16 copies, a layer or a projection that was
changed by a thousandth of its values is. Against a bfloat16 copy it takes three thousandths in a layer and about a
hundredth in a projection or a norm, since bfloat16 rounds by up to 0.4 % itself. In 8 bit, less than
one step of the quantization is not seen. Of the token table, values are taken from rows all over it, so that two
hundredths of its rows in a row are not missed, and from the rows of the adapter's own tokens.

Fingerprints of version 1, which hold no version, took values from the first rows of each tensor only.
"""

from __future__ import annotations

import base64
import binascii
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..towers import ADAPTER_LAYERS, POSITION_TABLES, TOKEN_TABLES, WRAPPED, find_towers, is_quantized


VERSION = 2
NUM_VALUES = 384  # about as many of all layers; at least one of each tensor
MIN_OF_PART = 48  # of a part with few tensors, such as a projection or a table, which may be trained alone
MAX_OF_PART = 400  # tensors; of a larger part every third or fifth is taken
NUM_OF_TOKENS = 96  # of the token table
MAX_OWN_TOKENS = 32  # further values of the token table, from the rows of the adapter's own tokens
FIRST_ROWS = 256  # of each tensor, in version 1
SEGMENT = 128  # values around a sampled one, in which the steps of a quantized tensor are looked for
MIN_SEGMENT = 16
MAX_LEVELS = 1024  # 8 bits have 256 levels; a dequantized tensor that was rounded to half precision has some more
MIN_QUANTIZED = 0.3  # share of tensors; in a model that is not quantized a few seem to be, such as those of ones
ROUNDING = 0.51  # of the distance between two numbers of a format, to the nearer one
SMALLEST = 1e-7  # half precision has no finer steps near 0
HALF = "f2:"  # in front of values in half precision
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly

Places = list[list[tuple[int, int]]]  # the rows and columns of the values that are sampled from each tensor of a part


@dataclass(frozen=True)
class Sampling:
    """
    Which values are sampled.

    Attributes:
        version: The version of the fingerprint.
        per_tensor: The number of values of each tensor, at least.
        rows: The numbers of rows of the tables in the training. Rows that were added since are not compared, and
            neither are rows that were removed.
        tokens: Token ids of the adapter's own texts.
    """

    per_tensor: int
    version: int = VERSION
    rows: dict[str, int] = field(default_factory=dict)
    tokens: Sequence[int] = ()

    def num_samples(self, name: str, tensors: list[torch.Tensor]) -> int:
        """Returns how many values of each tensor of a part are sampled."""
        if self.version > 1 and name.endswith(TOKEN_TABLES):
            return NUM_OF_TOKENS
        return max(self.per_tensor, min(MIN_OF_PART // len(tensors), *(tensor.numel() for tensor in tensors)))

    def places(self, name: str, tensors: list[torch.Tensor], num_samples: int) -> Places:
        """Returns the rows and columns of the values that are sampled from a part."""
        places = []
        for order, tensor in enumerate(tensors):
            num_rows = len(tensor) if tensor.ndim > 1 else tensor.numel()
            num_columns = max(1, tensor.numel() // max(1, num_rows))
            if self.version == 1 and tensor.ndim > 1:
                num_rows = min(FIRST_ROWS, num_rows)
            num_rows = self.rows.get(name, num_rows)
            shares = [(order * num_samples + i + 1) * GOLDEN_RATIO % 1 for i in range(num_samples)]
            places.append([divmod(int(share * num_rows * num_columns), num_columns) for share in shares])
            if name in self.rows and name.endswith(TOKEN_TABLES):
                columns = [int((i + 1) * GOLDEN_RATIO % 1 * num_columns) for i in range(len(self.tokens))]
                places[-1] += zip(self.tokens, columns)
        return places


def fingerprint_of(model: nn.Module, token_ids: Sequence[int] = ()) -> dict | None:
    """Returns the fingerprint of a model without its adapters, as it is saved; `None` if it has no values (meta).

    Args:
        model (`torch.nn.Module`):
            The model.
        token_ids (`Sequence[int]`, *optional*):
            The token ids of the adapter's own texts. The rows of the first 32 of them in the token table are compared,
            too: a training may have changed no others.
    """
    parts = _parts(model)
    sampling = Sampling(
        per_tensor=max(1, NUM_VALUES // max(1, sum(map(len, parts.values())))),
        rows={name: len(tensors[0]) for name, tensors in parts.items() if _is_table(name)},
        tokens=list(dict.fromkeys(token_ids))[:MAX_OWN_TOKENS],
    )
    places = {name: sampling.places(name, part, sampling.num_samples(name, part)) for name, part in parts.items()}
    values = {name: _sample(tensors, places[name]) for name, tensors in parts.items()}
    if not any(sample.isfinite().any() for sample in values.values()):
        return None
    fingerprint = {
        "version": VERSION,
        "per_tensor": sampling.per_tensor,
        "rows": sampling.rows,
        "tokens": sampling.tokens,
        "values": {name: _encode(sample) for name, sample in values.items()},
    }
    steps = {name: _steps(tensors, places[name]) for name, tensors in parts.items()}
    if torch.cat([*steps.values()]).gt(0).float().mean() < MIN_QUANTIZED:
        return fingerprint
    return {**fingerprint, "steps": {name: _encode(of_part) for name, of_part in steps.items()}}


def check_fingerprint(fingerprint: dict, model: nn.Module, adapter: str, base: str) -> None:
    """Warns (`UserWarning`) if the model is not the one that an adapter was trained on, or if that cannot be told.

    Args:
        fingerprint (`dict`):
            The fingerprint in the adapter's configuration.
        model (`torch.nn.Module`):
            The model that the adapter is loaded into. Tensors that have no values here (on the meta device, packed in
            8 or 4 bit), are not there (of a text tower alone), or hold a merged adapter are not compared.
        adapter, base (`str`):
            The adapter, and the base model that it was trained on, for the message.

    Raises:
        ValueError: If the fingerprint is damaged.
    """
    if is_of_later_version(fingerprint, VERSION, "base_model_fingerprint", adapter, "the base model is"):
        return
    sampling, recorded, steps = _decode(fingerprint)
    differing, compared = [], 0
    for name, tensors in _parts(model, sampling.version).items():
        before = recorded.get(name)
        if before is None or not any(map(_has_values, tensors)):
            continue
        places = _places_of(sampling, name, tensors, len(before))
        if places is None:
            differing.append(f"{name} has another number of layers or tensors")
            continue
        now = _sample(tensors, places)
        tolerance = ROUNDING * (_precision(before) + _precision(now)) * before.abs() + SMALLEST
        known = before.isfinite() & now.isfinite()
        is_other = known & ((before - now).abs() > tolerance)
        if is_other.any():  # it may be quantized, here or there
            step = torch.maximum(_steps(tensors, places), steps.get(name, torch.zeros_like(now)))
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


def is_of_later_version(record: dict, version: int, field_name: str, adapter: str, what_is: str) -> bool:
    """Returns whether a later version of this package made a record, and then warns that it is not compared.

    Args:
        record (`dict`):
            A field of an adapter's configuration. Without a version, it is of version 1.
        version (`int`):
            The latest version that is known here.
        field_name, adapter, what_is (`str`):
            The field, the adapter, and what is not compared, such as `"the base model is"`, for the message.

    Raises:
        ValueError: If the version is no version.
    """
    found = record.get("version", 1)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{field_name} is damaged (version is {found!r}); download or save the adapter again.")
    if found <= version:
        return False
    warnings.warn(
        f"Whether {what_is} that of the training is not checked: the adapter {adapter} holds a {field_name} of "
        f"version {found}, and this version of clip_prompt_peft reads those up to {version}; install a newer one.",
        UserWarning,
        stacklevel=3,
    )
    return True


def _places_of(sampling: Sampling, name: str, tensors: list[torch.Tensor], num_values: int) -> Places | None:
    """Returns the places of values that were sampled, or `None` if their number does not fit the tensors."""
    # per_tensor for all parts: as the first adapters had it
    for num_samples in (sampling.num_samples(name, tensors), sampling.per_tensor):
        places = sampling.places(name, tensors, num_samples)
        if sum(map(len, places)) == num_values:
            return places
    return None


def _is_table(name: str) -> bool:
    return name.endswith((*TOKEN_TABLES, *POSITION_TABLES))


def _parts(model: nn.Module, version: int = VERSION) -> dict[str, list[torch.Tensor]]:
    """Returns the tensors of each part (towers, their tables, projections, scale), in the order of their names."""
    towers = find_towers(model, "text")
    root = towers[0].embeddings_key.rpartition(".")[0] if towers else ""
    prefix = root.partition("text_model")[0] if "text_model" in root else root and f"{root}."
    is_bare = "text_model" not in root  # a text tower alone
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _base_tensors(model):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            part = "text_model" if is_bare else name.partition(".")[0]
            table = name.removesuffix(".weight").rpartition(".")[2]
            if version > 1 and _is_table(table) and name.endswith(".weight"):
                part = f"{part}.{table}"
            parts.setdefault(part, {})[name.removeprefix("text_model.")] = tensor
    in_order = {name: [tensors[key] for key in sorted(tensors)] for name, tensors in parts.items()}
    if version == 1:
        return in_order
    # An odd step does not always meet the same tensor of each layer, of which there are 16.
    return {name: tensors[:: math.ceil(len(tensors) / MAX_OF_PART) | 1] for name, tensors in in_order.items()}


def _base_tensors(module: nn.Module, prefix: str = "", in_adapter: bool = False, is_merged: bool = False) -> Iterator:
    """Yields the parameters that belong to no adapter, with the names that they have without adapters.

    Those that an adapter is merged into have no values, since they are not those of the base model now.
    """
    in_adapter = in_adapter or isinstance(module, ADAPTER_LAYERS)
    is_merged = is_merged or (isinstance(module, ADAPTER_LAYERS) and bool(getattr(module, "merged", False)))
    if is_quantized(module):  # the same tensors as it had before, whatever the library keeps in their place
        yield f"{prefix}weight", torch.empty(_weight_shape(module), device="meta")
        if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            yield f"{prefix}bias", bias.detach()
        return
    if not in_adapter:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, parameter.detach().to("meta") if is_merged else parameter.detach()
    for name, child in module.named_children():
        is_wrapped = in_adapter and name in WRAPPED
        path = prefix if is_wrapped else f"{prefix}{name}."
        yield from _base_tensors(child, path, in_adapter and not is_wrapped, is_merged)


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _has_values(tensor: torch.Tensor) -> bool:
    # Subclasses are packed by a quantization, or a part of a tensor that several devices share; few can be indexed.
    return type(tensor) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def _as_table(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _sample(tensors: list[torch.Tensor], places: Places) -> torch.Tensor:
    """Returns the values at some places, one tensor after the other; NaN where there are none."""
    samples = []
    for tensor, of_tensor in zip(tensors, places):
        sample = torch.full((len(of_tensor),), torch.nan)
        if _has_values(tensor):
            table = _as_table(tensor)
            there = [i for i, (row, _) in enumerate(of_tensor) if row < len(table)]
            rows, columns = ([of_tensor[i][axis] for i in there] for axis in (0, 1))
            sample[there] = table[rows, columns].float().cpu()
        samples.append(sample)
    return torch.cat(samples)


def _steps(tensors: list[torch.Tensor], places: Places) -> torch.Tensor:
    """Returns the distance between neighboring levels around each sampled value; 0 unless the tensor is quantized."""
    segments, indices, index = [], [], 0
    for tensor, of_tensor in zip(tensors, places):
        if not _has_values(tensor):
            index += len(of_tensor)
            continue
        table = _as_table(tensor)
        for row, column in of_tensor:
            index += 1
            if row >= len(table):
                continue
            lines = ((table[row], column), (table[:, column], row)) if tensor.ndim > 1 else ((table[:, 0], row),)
            for line, place in lines:
                if len(line) >= MIN_SEGMENT:
                    first = max(0, min(place - SEGMENT // 2, len(line) - SEGMENT))
                    line = line[first : first + SEGMENT]
                    padded = torch.cat([line, line[-1:].expand(SEGMENT - len(line))])
                    segments.append(padded.float().cpu())
                    indices.append(index - 1)
    steps = torch.zeros(index)
    if not segments:
        return steps
    ordered = torch.stack(segments).sort(dim=1).values  # (S, SEGMENT)
    gaps = ordered.diff(dim=1)
    smallest = gaps.masked_fill(gaps <= 0, torch.inf).min(dim=1).values  # (S,)
    is_quantized = smallest * MAX_LEVELS >= ordered[:, -1] - ordered[:, 0]
    smallest = torch.where(is_quantized & smallest.isfinite(), smallest, 0.0)
    return steps.scatter_reduce(0, torch.tensor(indices), smallest, "amax")


def _precision(values: torch.Tensor) -> torch.Tensor:
    """Returns the relative precision of each value, by the coarsest format that holds it."""
    precision = torch.full_like(values, torch.finfo(torch.float32).eps)
    for dtype in (torch.float16, torch.bfloat16):
        precision[values.to(dtype).float() == values] = torch.finfo(dtype).eps
    return precision


def _encode(values: torch.Tensor) -> str:
    """Returns float32 values as text, in half as many bytes if all of them are numbers of half precision."""
    half = values.half()
    if torch.equal(half.float().nan_to_num(torch.inf), values.nan_to_num(torch.inf)):
        return HALF + base64.b64encode(half.numpy().astype("<f2").tobytes()).decode()
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _floats(text: str) -> torch.Tensor:
    data = bytearray(base64.b64decode(text.removeprefix(HALF), validate=True))
    dtype = torch.float16 if text.startswith(HALF) else torch.float32
    return torch.frombuffer(data, dtype=dtype).float()  # raises ValueError if there are none


def _decode(fingerprint: dict) -> tuple[Sampling, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    try:
        values, steps = (
            {name: _floats(text) for name, text in fingerprint.get(field_name, {}).items() if text}
            for field_name in ("values", "steps")
        )
        per_tensor, rows, tokens = (
            fingerprint["per_tensor"],
            fingerprint.get("rows", {}),
            fingerprint.get("tokens", []),
        )
        for number in (per_tensor, *rows.values(), *(token + 1 for token in tokens)):
            if not isinstance(number, int) or not 1 <= number < 2**31:
                raise ValueError(f"{number!r} is no number of values or rows")
        if per_tensor > NUM_VALUES or len(tokens) > MAX_OWN_TOKENS:
            raise ValueError(f"per_tensor is {per_tensor!r}, and there are {len(tokens)} tokens")
        if any(len(steps[name]) != len(values.get(name, ())) for name in steps):
            raise ValueError("values and steps differ in number")
        return Sampling(per_tensor, fingerprint.get("version", 1), rows, tokens), values, steps
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(
            f"base_model_fingerprint is damaged ({type(error).__name__}: {error}); download or save the adapter again."
        ) from error
