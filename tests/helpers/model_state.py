"""What the state of a classifier with adapters is made of, and a newly built model in that state."""

import copy
import functools
from dataclasses import dataclass, field

import torch
from conftest import CLASS_NAMES, TINY_CLIP
from peft import LoraConfig, get_peft_model

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


KINDS = {
    "context": {"num_virtual_tokens": 4, "regularizer": "kgcoop"},
    "long": {"num_virtual_tokens": 6, "prompt_tuning_init": "RANDOM"},
    "class_specific": {"num_virtual_tokens": 2, "class_specific": True},
    "middle": {"num_virtual_tokens": 4, "class_token_position": "middle"},
    "deep": {"num_virtual_tokens": 2, "text_prompt_depth": 2},
    "vision": {"num_virtual_tokens": 0, "num_vision_virtual_tokens": 3, "vision_prompt_depth": 2},
    "meta_net": {"num_virtual_tokens": 2, "image_conditioned": True},
    "class_aware": {"num_virtual_tokens": 2, "class_aware_layer": 1},
    "maple": {
        "num_virtual_tokens": 2,
        "text_prompt_depth": 2,
        "num_vision_virtual_tokens": 2,
        "vision_prompt_depth": 2,
        "vision_prompts_from_text": True,
    },
    "projection": {"num_virtual_tokens": 2, "modules_to_save": ["text_projection"]},
}
MERGEABLE = {"context", "long", "projection"}
LORA = "towers"
POSITIONS = "text_model.embeddings.position_embedding.weight"


@functools.cache
def load_base() -> CLIPForPromptClassification:
    """Two layers in each tower, which is enough for deep prompts."""
    model = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=CLASS_NAMES).eval()
    for tower in (model.text_model, model.vision_model):
        tower.encoder.layers = tower.encoder.layers[:2]
    return model


@dataclass
class Adapter:
    """What an adapter was made with, and whether it is to be trained."""

    kind: str
    prompt_template: str
    class_names: list[str]
    is_trained: bool = True

    def config(self):
        return CLIPPromptTuningConfig(
            **KINDS[self.kind], prompt_template=self.prompt_template, class_names=self.class_names
        )

    @property
    def positions(self):
        return slice(1, 1 + KINDS[self.kind]["num_virtual_tokens"])


@dataclass
class State:
    """All that outputs depend on.

    Attributes:
        frozen: the base model's tensors, unmerged.
        own: the tensors of all adapters.
    """

    class_names: list[str]
    prompt_template: str = "a photo of a {}."
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    is_disabled: bool = False
    is_merged: bool = False
    has_lora: bool = False
    is_lora_trained: bool = True
    frozen: dict[str, torch.Tensor] = field(default_factory=lambda: frozen_tensors(load_base()))
    own: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def in_effect(self) -> Adapter | None:
        return None if self.is_disabled else self.adapters.get(self.active)

    @property
    def classes_in_use(self) -> list[str]:
        return self.in_effect.class_names if self.in_effect else self.class_names

    @property
    def trained(self) -> set[str]:
        """Names of the tensors that are to require a gradient."""
        names = {name for name, adapter in self.adapters.items() if adapter.is_trained}
        names |= {LORA} if self.has_lora and self.is_lora_trained else set()
        return {key for key in self.own if names & set(key.split("."))}

    def base(self) -> CLIPForPromptClassification:
        """The classifier without prompts."""
        classifier = copy.deepcopy(load_base())
        classifier.to(next(iter(self.frozen.values())).dtype)
        classifier.load_state_dict(self.frozen)
        classifier.set_prompt_template(self.prompt_template)
        classifier.set_class_names(self.class_names)
        if self.has_lora:
            classifier.add_adapter(LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj)"), LORA)
        return classifier

    def build(self) -> torch.nn.Module:
        """A new model in this state."""
        classifier = model = self.base()
        for name, adapter in self.adapters.items():
            if model is classifier:
                model = get_peft_model(classifier, adapter.config(), adapter_name=name)
            else:
                model.add_adapter(name, adapter.config())
        for name, parameter in parameters_of(classifier).items():
            if name in self.own:
                parameter.data = self.own[name].clone()
        if self.active:
            model.set_adapter(self.active)
        if self.is_merged:
            model.merge_adapter()
        if self.is_disabled:
            model.base_model.disable_adapter_layers()
        return model.eval()


def parameters_of(classifier) -> dict[str, torch.nn.Parameter]:
    """By the names that they have, or would have, where nothing is wrapped."""
    return {_plain(name): parameter for name, parameter in classifier.named_parameters()}


def own_tensors(classifier) -> dict[str, torch.Tensor]:
    """Copies of the tensors of all adapters."""
    return {name: value.detach().clone() for name, value in parameters_of(classifier).items() if _is_own(name)}


def frozen_tensors(classifier) -> dict[str, torch.Tensor]:
    """Copies of the base model's tensors."""
    return {
        _plain(name): value.detach().clone() for name, value in classifier.state_dict().items() if not _is_own(name)
    }


def _plain(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


def _is_own(name: str) -> bool:
    return any(part in name for part in (".learnable_", ".lora_", ".modules_to_save."))
