"""What several tests do with an adapter."""

import torch
from peft import get_peft_model

from clip_prompt_peft import CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings


def layer_of(model):
    """The wrapped text embeddings of the model, of which there must be one."""
    (layer,) = [module for module in model.modules() if isinstance(module, CLIPTextLearnableEmbeddings)]
    return layer


def vectors_of(model, adapter_name="default"):
    return layer_of(model).learnable_embeddings[adapter_name]


@torch.no_grad()
def randomize(model, adapter_name="default", seed=0):
    """Gives the adapter vectors that are far from any word, as if it had been trained."""
    vectors = vectors_of(model, adapter_name)
    vectors.copy_(0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))


def tuned(base, adapter_name="default", seed=0, **fields):
    """The base model with a new adapter in it, as if it had been trained."""
    model = get_peft_model(base, CLIPPromptTuningConfig(**fields), adapter_name=adapter_name).eval()
    randomize(model, adapter_name, seed)
    return model
