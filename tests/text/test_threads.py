"""Threads that share a model get the results of one thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import slow_param
from families import FAMILIES, Case, takes

from clip_prompt_peft import PRESETS


NUM_THREADS, NUM_CALLS = 8, 40
CASES = [("CLIP", preset) for preset in PRESETS] + [("Siglip", "cocoop"), ("Siglip", "coop-csc")]
OTHERS = [(family, preset) for family in FAMILIES if family != "CLIP" for preset in ("coop", "maple")]
CASES += [slow_param(case) for case in OTHERS if takes(*case)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@torch.no_grad()
def test_every_call_gives_the_logits_of_a_single_thread(case):
    family, preset = case
    case = Case(family)
    model = case.prompted(preset)
    images = [{name: value[index : index + 1] for name, value in case.images.items()} for index in range(4)]
    expected = [model(**image).logits for image in images]

    def call(index):
        if index % 10 == 0:
            model.get_base_model().class_encoder.clear()  # so that threads compute the embeddings at the same time
        with torch.no_grad():
            return model(**images[index % 4]).logits

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for index, logits in enumerate(pool.map(call, range(NUM_CALLS))):
            torch.testing.assert_close(logits, expected[index % 4], rtol=1e-4, atol=1e-4)
