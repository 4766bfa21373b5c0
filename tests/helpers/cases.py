"""The models that the life cycle of an adapter is run through."""

import copy
import functools

import torch
from adapters import as_if_trained, tuned
from conftest import CLASS_NAMES, TINY_CLIP
from peft import get_peft_model
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


TEXTS = ["a photo of a animal.", "a photo of a fire truck.", "a photo of a sun."]
MODEL_CLASSES = [CLIPModel, CLIPTextModelWithProjection, CLIPTextModel, CLIPForPromptClassification]
MERGED = {"rtol": 0, "atol": 1e-4}  # merging changes the order of two additions


@functools.cache
def load_base(model_class):
    kwargs = {"class_names": CLASS_NAMES} if model_class is CLIPForPromptClassification else {}
    return model_class.from_pretrained(TINY_CLIP, **kwargs).eval()


def new_classifier(class_names=CLASS_NAMES, dtype=torch.float32):
    classifier = copy.deepcopy(load_base(CLIPForPromptClassification)).to(dtype)
    classifier.set_class_names(class_names)
    return classifier


def tuned_classifier(**fields):
    """A classifier with an adapter as if every tensor of it had been trained."""
    return as_if_trained(get_peft_model(new_classifier(), CLIPPromptTuningConfig(**fields)).eval())


class Case:
    """One of the models, with inputs for it and the tensor of its output that is compared."""

    def __init__(self, model_class, tokenizer, pixel_values, labels):
        self.model_class = model_class
        texts = tokenizer(TEXTS, padding=True, return_tensors="pt")
        self.inputs = {
            CLIPModel: {**texts, "pixel_values": pixel_values, "return_loss": True},
            CLIPTextModelWithProjection: texts,
            CLIPTextModel: texts,
            CLIPForPromptClassification: {"pixel_values": pixel_values, "labels": labels},
        }[model_class]

    def base(self):
        return copy.deepcopy(load_base(self.model_class))

    def tuned(self, adapter_name="default", seed=0, **fields):
        return tuned(self.base(), adapter_name, seed, **fields)

    def output(self, model):
        out = model(**self.inputs)
        for name in ("logits", "logits_per_image", "text_embeds", "pooler_output"):
            if getattr(out, name, None) is not None:
                return getattr(out, name)
        raise AssertionError(f"no output to compare in {type(out).__name__}")

    def loss(self, model):
        out = model(**self.inputs)
        return out.loss if getattr(out, "loss", None) is not None else out[0].square().mean()
