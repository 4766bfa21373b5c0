"""Packed prompts for vectors of each class in a deeper layer. That they are exact is tested in test_encoder_kinds."""

import torch
from adapters import as_if_trained
from cases import new_classifier
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig


NAMES = ["cat", "golden retriever", "x-ray image", "lily of the valley"]


def config_from(start_idx):
    return CLIPPromptTuningConfig(num_virtual_tokens=2, start_idx=start_idx, class_aware_layer=1)


def class_embeds(model):
    with torch.no_grad():
        return model.get_base_model().get_class_embeds()


def test_adapters_with_the_same_prompts_and_other_positions_do_not_share_their_packing():
    model = get_peft_model(new_classifier(NAMES), config_from(1)).eval()
    model.add_adapter("later", config_from(3))
    as_if_trained(model)
    first = class_embeds(model)
    model.set_adapter("later")
    later = class_embeds(model)
    assert not torch.allclose(first, later, atol=1e-3)
    model.get_base_model().class_encoder.path = "plain"
    torch.testing.assert_close(later, class_embeds(model), rtol=0, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(first, class_embeds(model), rtol=0, atol=1e-5)
