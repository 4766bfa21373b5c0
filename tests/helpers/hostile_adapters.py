"""Adapters as somebody might write them who wants to do harm, or whose disk is broken.

    python tests/hostile_adapters.py --inputs 5000

Takes a good adapter, changes its configuration, the header of its safetensors file, its tensors or plain bytes at
random, and loads it in every way there is. Either it is refused by an exception that says why, or it is a model whose
outputs are finite. The exit code is 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from clip_prompt_peft import AutoPeftModelForPromptClassification, CLIPForPromptClassification, CLIPPromptTuningConfig  # noqa: E402


TINY_CLIP = str(Path(__file__).parents[2] / "clip_prompt_peft" / "assets" / "tiny_clip")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "shared": {},
    "per class": {"class_specific": True},
    "MaPLe": {"num_vision_virtual_tokens": 4, "vision_prompts_from_text": True, "text_prompt_depth": 2},
    "conditioned": {"image_conditioned": True, "regularizer": "kgcoop"},
    "in the middle": {"class_token_position": "middle"},
}
# Refusals of ours are ValueError; OSError, SafetensorError and RuntimeError are how the libraries beneath say it.
REFUSALS = (ValueError, OSError, SafetensorError, RuntimeError)
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 73, 75, 1000, 2**31, 2**63, 10**30, -(10**30), 0.5, float("nan")),
    *(
        float("inf"),
        "",
        " ",
        "a",
        "{}",
        "{}{}",
        "a photo of {}",
        "end",
        "front",
        "TEXT",
        "RANDOM",
        "kgcoop",
        "prograd",
    ),
    *(
        "\x00",
        "\u202ecat",
        "\ud800",
        "../../etc/passwd",
        "/dev/zero",
        "/",
        "x" * 100_000,
        "<|endoftext|>",
        ".*",
        "(",
        "all-linear",
    ),
    *([], [None], [""], ["a"], ["a", "a"], [1, 2], [-1] * 4, [10**30] * 4, ["a"] * 4, [[]], [{}], "1234"),
    *({}, {"a": 1}, {"a": float("nan")}, {"kgcoop": 1e400}, [str(i) for i in range(3000)], ["cat \ud800", "dog"]),
    *(["a\x1b[31m", "b\u202e"], ["{}", "{0}"], ["cat " * 100, "dog"], ["<|endoftext|>", "dog"], ["text_projection"]),
    json.loads("[" * 200 + "]" * 200),
]
MORE_FIELDS = ("auto_mapping", "runtime_config", "peft_type", "task_type", "__class__", "self", "megatron_config")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, problems = try_inputs(args.inputs, args.seed)
    for problem in problems:
        print(problem, "\n")
    print(json.dumps({"inputs": args.inputs, "problems": len(problems), **counts}))
    sys.exit(bool(problems))


def try_inputs(num_inputs: int, seed: int = 0) -> tuple[dict[str, int], list[str]]:
    """Tries as many changed adapters, and returns how many ended how, and what ought not to have happened."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rng, counts, problems = random.Random(seed), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        good = make_good_adapters(Path(folder) / "good")
        bad, slowest = Path(folder) / "bad", 0.0
        for _ in range(num_inputs):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(rng.choice(good), bad)
            changes = [rng.choice(CHANGES)(bad, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            load = rng.choice(list(WAYS))
            before, start = snapshot(Path(folder)), time.monotonic()
            outcome, error = try_to_load(load, bad)
            slowest = max(slowest, time.monotonic() - start)
            counts[outcome] += 1
            if snapshot(Path(folder)) != before:
                outcome, error = "wrote", "files have changed"
            if outcome in ("crash", "not finite", "wrote", "base model changed"):
                problems.append(f"{outcome}: {load} after {changes}\n{error}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {**counts, "slowest_seconds": round(slowest, 1), "peak_memory_mb": memory}, problems


def make_good_adapters(folder: Path) -> list[Path]:
    for name, fields in KINDS.items():
        model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "red car", "dog"])
        get_peft_model(model, CLIPPromptTuningConfig(**fields)).save_pretrained(folder / name)
    return sorted(folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Ways to load


def with_peft(folder: Path):
    return PeftModel.from_pretrained(new_classifier(), folder)


def with_peft_beside_another(folder: Path):
    model = get_peft_model(new_classifier(), CLIPPromptTuningConfig())
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return model


def with_peft_into_clip(folder: Path):
    return PeftModel.from_pretrained(copy.deepcopy(base(CLIPModel)), folder)


def with_auto_class(folder: Path):
    return AutoPeftModelForPromptClassification.from_pretrained(folder)


def with_classifier(folder: Path):
    return CLIPForPromptClassification.from_pretrained(folder)


def with_transformers(folder: Path):
    model = new_classifier()
    model.load_adapter(folder)
    return model


WAYS = {
    way.__name__: way
    for way in (
        with_peft,
        with_peft_beside_another,
        with_peft_into_clip,
        with_auto_class,
        with_classifier,
        with_transformers,
    )
}


def new_classifier():
    return copy.deepcopy(base(CLIPForPromptClassification))


def base(model_class, loaded={}):  # noqa: B006, kept from call to call
    if model_class not in loaded:
        names = {"class_names": ["cat", "red car", "dog"]} if model_class is CLIPForPromptClassification else {}
        loaded[model_class] = model_class.from_pretrained(TINY_CLIP, **names)
    return loaded[model_class]


def try_to_load(way: str, folder: Path) -> tuple[str, str]:
    try:
        model = WAYS[way](folder).eval()
        outputs = run(model)
    except REFUSALS as error:
        return ("refused", str(error)) if str(error) else ("crash", traceback.format_exc())
    except Exception as error:
        return ("refused by others" if is_from_elsewhere(error) else "crash"), traceback.format_exc()
    if not all(output.isfinite().all() for output in outputs):
        return "not finite", ""
    return ("works" if is_frozen(model) else "base model changed"), ""


def is_frozen(model) -> bool:
    """Whether what an adapter might overwrite is as it was."""
    clip = model.get_base_model() if isinstance(model, PeftModel) else model
    original = base(CLIPModel)
    pairs = (
        (clip.logit_scale, original.logit_scale),
        (clip.text_projection.weight, original.text_projection.weight),
        (clip.text_model.embeddings.token_embedding.weight, original.text_model.embeddings.token_embedding.weight),
    )
    return all(torch.equal(tensor, before) for tensor, before in pairs)


def is_from_elsewhere(error: Exception) -> bool:
    """Whether it is peft, transformers or json that raised it, before any code of ours was asked."""
    frames = traceback.extract_tb(error.__traceback__)
    return not any("/clip_prompt_peft/" in frame.filename for frame in frames)


@torch.no_grad()
def run(model) -> list[torch.Tensor]:
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    clip = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(clip, CLIPForPromptClassification):
        return [model(pixel_values=images).logits]
    layout = clip.text_model.embeddings.prompt_layout
    if layout.has_per_text_vectors or layout.has_per_text_positions:
        return []  # these need the classifier
    texts = base(CLIPForPromptClassification).tokenizer(
        [layout.padded_template.replace("{}", "cat")], padding=True, return_tensors="pt"
    )
    return [model(**texts, pixel_values=images).logits_per_image]


# Changes


def change_a_field(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    name = rng.choice([*config, *MORE_FIELDS])
    config[name] = rng.choice(VALUES)
    write_config(folder, config)
    return f"{name} = {str(config[name])[:100]!r}"


def leave_out_a_field(folder: Path, rng: random.Random) -> str:
    config = read_config(folder)
    name = rng.choice(list(config) or [""])
    config.pop(name, None)
    write_config(folder, config)
    return f"no {name}"


def change_bytes_of_config(folder: Path, rng: random.Random) -> str:
    return change_bytes(folder / CONFIG, rng)


def change_bytes_of_weights(folder: Path, rng: random.Random) -> str:
    return change_bytes(folder / WEIGHTS, rng)


def change_header(folder: Path, rng: random.Random) -> str:
    content = (folder / WEIGHTS).read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = rng.choice(list(header))
        entry = header[name]
        part = rng.choice(list(entry))
    except (ValueError, IndexError, struct.error, TypeError):
        return "header left"
    shapes = [[-1, 4], [2**40, 2**40], [10**30], [0], [0, 128], [], [128, 4], [4, 128, 1], ["a"], [1.5], 4, None]
    values = {"dtype": ["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "C64", "X", None, 1], "shape": shapes}
    values["data_offsets"] = [[0, 0], [0, 2**62], [-1, 4], [8, 4], [0], None, [4, 2052], [0, 10**30]]
    entry[part] = rng.choice(values.get(part, ["", None, "tf", 1, {}]))
    if rng.random() < 0.3:
        header[rng.choice(["", "x" * 1000, "__metadata__", "../x", "\x00"])] = copy.deepcopy(entry)
    new = json.dumps(header).encode()
    length = (
        len(new) if rng.random() < 0.8 else rng.choice([0, 1, len(new) - 1, len(new) + 1, 2**63, 2**64 - 1, 10**8])
    )
    (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", length) + new + content[8 + struct.unpack("<Q", content[:8])[0] :]
    )
    return f"header of {name}: {part} = {entry[part]}, length {length}"


def any_tensor(folder: Path, rng: random.Random) -> tuple[dict[str, torch.Tensor], str | None]:
    """All tensors, and the name of one; `None` if an earlier change has left nothing to be read."""
    try:
        tensors = load_file(folder / WEIGHTS)
        return tensors, rng.choice(list(tensors))
    except (SafetensorError, IndexError):
        return {}, None


def change_a_tensor(folder: Path, rng: random.Random) -> str:
    tensors, name = any_tensor(folder, rng)
    if name is None:
        return "tensors left"
    change = rng.choice(list(TENSOR_CHANGES))
    # the errors are those of a change that does not go with an earlier one
    with torch.no_grad(), contextlib.suppress(IndexError, RuntimeError):
        tensors[name] = TENSOR_CHANGES[change](tensors[name].clone()).contiguous()
    save_file(tensors, folder / WEIGHTS)
    return f"{name} {change}"


def rename_a_tensor(folder: Path, rng: random.Random) -> str:
    tensors, name = any_tensor(folder, rng)
    if name is None:
        return "names left"
    frozen = rng.choice(list(FROZEN))
    new = rng.choice(["x", name + ".default", name.replace("text_model", ""), frozen, frozen])
    tensors[new] = torch.full(FROZEN[new], 7.0) if new in FROZEN else tensors[name]
    if rng.random() < 0.5:
        del tensors[name]
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS)
    return f"{name} also, or instead, as {new}"


FROZEN = {
    "base_model.model.text_model.embeddings.base_layer.token_embedding.weight": (3072, 128),
    "base_model.model.text_projection.weight": (128, 128),
    "base_model.model.logit_scale": (),
}
TENSOR_CHANGES = {
    "is NaN": lambda tensor: tensor.fill_(float("nan")),
    "has one NaN": lambda tensor: tensor.index_fill_(0, torch.tensor(0), float("nan")),
    "is Inf": lambda tensor: tensor.fill_(float("inf")),
    "is huge": lambda tensor: tensor.float().fill_(3e38),
    "is half": lambda tensor: tensor.half(),
    "is bfloat16": lambda tensor: tensor.bfloat16(),
    "is double": lambda tensor: tensor.double(),
    "is huge and double": lambda tensor: tensor.double().fill_(1e300),
    "is integer": lambda tensor: tensor.long(),
    "is bool": lambda tensor: tensor.bool(),
    "is complex": lambda tensor: tensor.to(torch.complex64),
    "is float8": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    "is shorter": lambda tensor: tensor[:-1],
    "is empty": lambda tensor: tensor[:0],
    "is transposed": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor,
    "has a further dimension": lambda tensor: tensor[None],
    "is flat": lambda tensor: tensor.flatten(),
    "is a number": lambda tensor: tensor.flatten()[0] if tensor.numel() else tensor,
}
CHANGES = (
    change_a_field,
    change_a_field,
    change_a_field,
    leave_out_a_field,
    change_bytes_of_config,
    change_bytes_of_weights,
    change_header,
    change_a_tensor,
    rename_a_tensor,
)


def change_bytes(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "cut", "insert", "repeat"))
    where = rng.randrange(len(content) + 1)
    if kind == "flip" and content:
        content[where % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[where:]
    elif kind == "insert":
        content[where:where] = rng.randbytes(rng.randrange(1, 9))
    else:
        content[where:where] = content[where : where + 64]
    file.write_bytes(content)
    return f"{kind} at {where} of {file.name}"


def read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def write_config(folder: Path, config: dict) -> None:
    (folder / CONFIG).write_text(json.dumps(config))


if __name__ == "__main__":
    main()
