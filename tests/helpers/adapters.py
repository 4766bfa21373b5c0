"""Functions that several tests apply to models with an adapter, and to the folders of adapters."""

import json

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from clip_prompt_peft import ClassHeadConfig, CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings, fit_class_head
from clip_prompt_peft.tuner import CLIPTeacherClasses


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# Parts of a model


def base_of(model):
    """The model without peft's wrapper."""
    return model.base_model.model if isinstance(model, PeftModel) else model


def layer_of(model):
    """The wrapped text embeddings of the model, of which there must be one."""
    (layer,) = [module for module in model.modules() if isinstance(module, CLIPTextLearnableEmbeddings)]
    return layer


def vectors_of(model, adapter_name="default"):
    """The learnable vectors in the input of the text tower."""
    return layer_of(model).learnable_embeddings[adapter_name]


def learnable(model):
    """The tensors of all prompt adapters by the names that they have in the base model."""
    named = model.named_parameters()
    return {name.removeprefix("base_model.model."): value for name, value in named if ".learnable_" in name}


# Models


def prompted(base, **fields):
    """The base model with a new adapter whose vectors are random, in evaluation mode."""
    settings = {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM", **fields}
    return get_peft_model(base, CLIPPromptTuningConfig(**settings)).eval()


@torch.no_grad()
def randomize(model, adapter_name="default", seed=0):
    """Gives the adapter vectors that are far from any word, as if it had been trained."""
    vectors = vectors_of(model, adapter_name)
    vectors.copy_(0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))


def fitted(model):
    """The model, of which a class head, if it has one, has read a few images of each class."""
    if isinstance(model.active_peft_config, ClassHeadConfig) and model.active_peft_config.target_modules is None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(12) % len(model.class_names)
        embeds = torch.randn(12, model.get_base_model().embed_width, generator=generator)
        fit_class_head(model, {"image_embeds": embeds, "labels": labels})
    return model


@torch.no_grad()
def as_if_trained(model, std=0.1, seed=0):
    """Adds noise to every tensor that is trained, and returns the model; of a teacher, class embeddings are random."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, CLIPTeacherClasses) and (name := layer.teacher_adapter):
            class_names = layer.prompt_configs[name].teacher_class_names
            embeds = torch.randn(len(class_names), layer.prompt_layouts[name].projection_dim, generator=generator)
            layer.set_teacher_class_embeds(embeds, class_names)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def tuned(base, adapter_name="default", seed=0, **fields):
    """The base model with a new adapter in it, as if it had been trained."""
    model = get_peft_model(base, CLIPPromptTuningConfig(**fields), adapter_name=adapter_name).eval()
    randomize(model, adapter_name, seed)
    return model


# Running them


@torch.no_grad()
def logits_of(model, pixel_values):
    return model(pixel_values=pixel_values).logits


def train_with_sgd(model, inputs, lr, num_steps):
    """The losses of a few steps on the same inputs."""
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    losses = []
    for _ in range(num_steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Folders


def vectors_in(folder):
    """The only tensor of a saved adapter."""
    (vectors,) = load_file(folder / WEIGHTS).values()
    return vectors


def change_config(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder, function):
    """Applies `function` to every saved tensor."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: function(tensor).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
