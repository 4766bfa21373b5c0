"""What the benchmarks share: a CLIP of real size with random weights, class names of realistic length, clocks.

Nothing is downloaded: the model comes from a configuration, the tokenizer is that of the embedded tiny CLIP.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable

import psutil
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP


SIZES = {
    # the architecture of openai/clip-vit-base-patch32
    "vit-b-32": {
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        "projection_dim": 512,
    },
    # only to see that a benchmark runs
    "tiny": {
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        "projection_dim": 16,
    },
}
# How many tokens each of the 1,000 ImageNet names (first lemma of each synset, in order) has in CLIP's tokenizer.
TOKENS_OF_IMAGENET_NAMES = (
    "2132221211222221211231213422342223322223232322223224233222222422222223215222221224323112273222122171"
    "2233212122232112254232232222221322134324522212222221223432242212272323322442233333232222524312423332"
    "2264344223522222223323335322343125222344331222223322431212221351122232221223222221222211121111232222"
    "2124224211111231222131212241322121322122112331211224122111351112521322322222532312222222221222112222"
    "2122221122212211212212221121111222212122222171122222121212132211122212111212131221213212132213222112"
    "2124221233212222112113323113212222121212212222222122212222122112322222222323211211232221125322122221"
    "1222211511124212122212221112112122222122323122122211222321222221121312322122212111322321322211222112"
    "2122221322313314211221421112221221222213221121121111111222121211123321212212121221111221222212212222"
    "1222221222222322221123231221212221122112212113212111222221212212221212231431132121111122111221122122"
    "2211222211212122222222111222222111122111222112212111111221122121212112111221322112122141111223327212"
)


def build_classifier(
    num_classes: int, size: str = "vit-b-32", device: str = "cpu", dtype: str = "float32"
) -> CLIPForPromptClassification:
    """A classifier with random weights, made on the device: on the CPU that takes longer than measuring."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    config = CLIPConfig(**SIZES[size])
    config.text_config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.device(device):
        clip = CLIPModel(config).to(getattr(torch, dtype)).requires_grad_(False)
    return CLIPForPromptClassification.from_clip(clip, tokenizer, class_names_like_imagenet(num_classes, tokenizer))


def add_prompts(classifier: CLIPForPromptClassification, num_virtual_tokens: int):
    """The classifier with a context of n vectors, as CoOp starts it."""
    template = " ".join(["X"] * num_virtual_tokens) + " {}."
    config = CLIPPromptTuningConfig(
        num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="RANDOM", prompt_template=template
    )
    return get_peft_model(classifier, config).train()


def class_names_like_imagenet(num_classes: int, tokenizer) -> list[str]:
    """Names of one-token words, with as many of them as the ImageNet name of that index has tokens."""
    draw = random.Random(0)
    words = one_token_words(tokenizer)
    draw.shuffle(words)
    unused = iter(words)  # for names of a single word; when there are no more, two words it is
    names: dict[str, None] = {}
    for length in itertools.cycle(map(int, TOKENS_OF_IMAGENET_NAMES)):
        if len(names) == num_classes:
            return list(names)
        name = next(unused, None) if length == 1 else None
        while name is None or name in names:
            name = " ".join(draw.choices(words, k=max(2, length)))
        names[name] = None


def one_token_words(tokenizer) -> list[str]:
    """Words of letters that the tokenizer reads as one token each, sorted."""
    words = [token[:-4] for token in sorted(tokenizer.get_vocab()) if token.endswith("</w>") and token[:-4].isalpha()]
    return [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]


def describe_prompts(classifier: CLIPForPromptClassification) -> tuple[int, int, int]:
    """Tokens that all prompts share, tokens of all suffixes, and tokens of the longest prompt."""
    prompts = classifier.class_prompts
    shared = int((prompts.input_ids == prompts.input_ids[0]).all(dim=0).long().cumprod(dim=0).sum())
    lengths = prompts.attention_mask.sum(dim=1)
    return shared, int((lengths - shared).sum()), int(lengths.max())


def needed_flops(classifier: CLIPForPromptClassification) -> float:
    """FLOPs of the text tower's matrices, forward and backward, over the tokens that have to be computed: the shared
    ones once, and every suffix. Recomputation and padding do not count."""
    shared, suffixes, _ = describe_prompts(classifier)
    matrices = [m.weight.numel() for m in classifier.text_model.modules() if isinstance(m, torch.nn.Linear)]
    return 2 * 2 * sum(matrices) * (shared + suffixes)


def measure_gemm_peak(device: str = "cpu", dtype: str = "float32", seconds: float = 1.0) -> float:
    """FLOP/s of the best of many large matrix products."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, time_once(lambda: a @ b, device))
    return 2 * 2048**3 / best


def time_once(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turn(functions: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """The median seconds of each, run in turn so that a busy moment of the machine hits all of them alike; a first
    round is not counted."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            seconds = time_once(function, device)
            if repeat:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_launches(function: Callable[[], object], device: str) -> tuple[int, float] | None:
    """Kernels that a call launches, and the milliseconds in which at least one runs; `None` on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    synchronize(device)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        function()
        synchronize(device)
    events = profiler.events()
    launches = sum(event.name.lower().startswith(("cudalaunchkernel", "culaunchkernel")) for event in events)
    on_card = [event.time_range for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return launches, busy_time([(span.start, span.end) for span in on_card]) / 1000


def busy_time(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans (start, end) cover together."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def bytes_held(device: str) -> int:
    """The memory of the process, or what torch has allocated on a device."""
    if device == "cpu":
        return psutil.Process().memory_info().rss
    return torch.get_device_module(device).memory_allocated()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """As Markdown, columns aligned."""
    table = [header, ["-" * 3] * len(header), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    print(f"\n{title}\n")
    for row in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
