"""The path that is declared exact for a text tower is the fastest one that a trial finds to be exact."""

import pytest
import torch
from adapters import as_if_trained
from families import FAMILIES, Case, takes
from peft import IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig, get_peft_model

from clip_prompt_peft import PRESETS, ClassHeadConfig
from clip_prompt_peft.text.class_aware import pack_class_aware
from clip_prompt_peft.text.packing import CUT, PACKED, PATHS, PLAIN, build_chunk, exact_path, num_shared_positions


OTHER_METHODS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"]),
    "dora": LoraConfig(r=4, target_modules=["out_proj", "fc2"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    "ln_tuning": LNTuningConfig(target_modules=["layer_norm1", "final_layer_norm"]),
    "trainable_tokens": TrainableTokensConfig(target_modules=["token_embedding"], token_indices=[5, 6]),
    "class_head": ClassHeadConfig(target_modules="block-layernorms"),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["fc1", "text_projection"]),
}


@torch.no_grad()
def encode(classifier, path):
    prompts, layout = classifier.class_prompts, classifier.prompt_layout
    num_shared = num_shared_positions(prompts, layout)
    classes = torch.arange(len(prompts.texts))
    chunk = build_chunk(path, classes, prompts, num_shared, classifier.device)
    image_vectors = class_priors = None
    if layout is not None and layout.class_aware_layer is not None:
        class_priors = classifier.teacher.class_embeds(classifier, layout.class_prior_templates)
        if path == PACKED:
            chunk = pack_class_aware(classes, prompts, num_shared, layout, classifier.device)
    if layout is not None and layout.image_conditioned:
        image_embeds = torch.nn.functional.normalize(torch.randn(2, classifier.embed_width), dim=-1)
        image_vectors = classifier.text_embeddings.per_text_vectors(image_embeds)
    return chunk.encode(classifier, layout, image_vectors, class_priors)


def is_exact(classifier, path):
    """Tried out: whether the path gives the embeddings of the plain one."""
    embeds = []
    for tried in (PLAIN, path):
        torch.manual_seed(0)
        try:
            embeds.append(encode(classifier, tried))
        except (AttributeError, TypeError, RuntimeError):  # the tower has other parts
            return False
    return torch.allclose(*embeds, atol=1e-5)


def assert_as_declared(classifier):
    fastest = next(path for path in PATHS if is_exact(classifier, path))
    full = classifier.class_prompts.full_length == classifier.class_prompts.input_ids.shape[1]
    if fastest != PACKED and full:
        fastest = PLAIN  # prompts are at full length anyway, so that cutting them changes nothing
    assert exact_path(classifier) == fastest


@pytest.mark.parametrize(
    "family, preset", [(family, preset) for family in FAMILIES for preset in [None, *PRESETS] if takes(family, preset)]
)
def test_of_every_family_and_every_kind_of_prompt(family, preset):
    assert_as_declared(Case(family).prompted(preset).get_base_model())


def test_classes_share_no_dropout():
    """CLIP-LoRA has one in front of its matrices; each class has random numbers of its own."""
    classifier = Case("CLIP").classifier()
    model = get_peft_model(classifier, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.25))
    as_if_trained(model, std=0.3)
    assert exact_path(classifier.eval()) == PACKED
    assert exact_path(classifier.train()) == CUT
    means = []
    for path in (PLAIN, CUT, PACKED):
        torch.manual_seed(0)
        embeds = torch.stack([encode(classifier, path)[0] for _ in range(60)])  # (60, C, E)
        noise = (embeds - embeds.mean(dim=0)).flatten(2)
        means.append((noise[:, 0] * noise[:, 1]).sum(dim=-1).mean() / noise.square().sum(dim=-1).mean())
    assert abs(means[0]) < 0.1 and abs(means[1]) < 0.1 < means[2]


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_with_adapters_of_other_methods(method):
    classifier = Case("CLIP").classifier()
    model = get_peft_model(classifier, OTHER_METHODS[method]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    assert_as_declared(classifier)
