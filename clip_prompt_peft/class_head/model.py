"""The tuner: puts a head, and copies of LayerNorms, into a classifier, and fits saved tensors to the model."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from peft import LNTuningModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..text import normalize
from ..towers import execution_device, find_towers
from ..tuner.base_model import check_adapter_name, forget_if_refused, warn_of_other_classes
from ..tuner.files import INDEX, check_tensors
from ..tuner.quantized import check_passes_gradients
from .config import CACHE, ClassHeadConfig
from .heads import LinearHead
from .layer import MERGE_OBSTACLE, ClassHeadLayer, TunedLayerNorm
from .resolve import HEAD, layer_norms, resolve, start_of


class ClassHeadModel(LNTuningModel):
    """
    Creates a classifier with a class head, and with tuned LayerNorms if the configuration names some.

    Args:
        model ([`PromptClassificationMixin`]):
            A classifier with class names.
        config ([`ClassHeadConfig`]):
            The configuration.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from clip_prompt_peft import AutoModelForPromptClassification, ClassHeadConfig

    >>> name = "openai/clip-vit-base-patch32"
    >>> classifier = AutoModelForPromptClassification.from_pretrained(name, class_names=["cat", "dog"])
    >>> model = get_peft_model(classifier, ClassHeadConfig())
    >>> model.print_trainable_parameters()
    trainable params: 1,024 || all params: 151,278,337 || trainable%: 0.0007
    ```
    """

    tuner_layer_cls = (ClassHeadLayer, TunedLayerNorm)  # type: ignore[assignment]  # for isinstance, which takes both

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        check_adapter_name(adapter_name)
        # peft activates the first adapter of a tuner, and transformers makes a new tuner for each adapter.
        self._becomes_active, self._injected = not hasattr(self, "_injected"), adapter_name
        with forget_if_refused(self, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        resolved = resolve(peft_config, self.model)
        if self._becomes_active and peft_config.has_weights:
            warn_of_other_classes(resolved, self.model)
        self._layer_norms = layer_norms(resolved, self.model)
        if self._layer_norms and not peft_config.inference_mode:
            check_passes_gradients(self.model, next(iter(find_towers(self.model, "text"))).like.dtype)
        self._start = None if peft_config.has_weights else self._start_without_others(resolved)
        self.peft_config[self._injected] = resolved  # a copy: the user may use the same object for another model
        return resolved

    def _start_without_others(self, config: ClassHeadConfig) -> torch.Tensor:
        """Returns the rows of a new head, which does not start from other heads and LayerNorms in the model."""
        layers = [layer for layer in self._layers() if not layer.disable_adapters]
        trainable = [(tensor, tensor.requires_grad) for layer in layers for tensor in layer.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return start_of(config, self.model)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for tensor, requires_grad in trainable:
                tensor.requires_grad_(requires_grad)

    def _layers(self) -> list[ClassHeadLayer | TunedLayerNorm]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _check_target_module_exists(self, peft_config, key):
        """Finds the head and the LayerNorms, which were found before."""
        return key == HEAD or key in self._layer_norms

    def _create_and_replace(  # type: ignore[override]  # without parameters as targets
        self, peft_config, adapter_name, target, target_name, parent, current_key
    ) -> None:
        is_disabled = any(layer.disable_adapters for layer in self._layers())
        if current_key != HEAD:
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
            layer = getattr(parent, target_name)
        else:
            layer = target if isinstance(target, ClassHeadLayer) else ClassHeadLayer(target, adapter_name)
            device = execution_device(self.model.text_model)
            like = torch.empty(0, dtype=self.model.dtype, device=device) if self._start is None else self._start
            layer.update_layer(adapter_name, peft_config, like)
            if self._start is None:
                layer.await_weights(adapter_name)
            else:
                layer.head(adapter_name).reset(self._start)
            setattr(parent, target_name, layer)
            layer.label_with(self.model.config)
        if is_disabled and not layer.disable_adapters:
            layer.enable_adapters(False)  # as all other layers are

    def _create_new_module(self, peft_config, target, adapter_name) -> nn.Module:
        with warnings.catch_warnings():  # peft looks for numbers of features, of which it knows none for a LayerNorm
            warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)
            return TunedLayerNorm(target, adapter_name, config=peft_config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Unlike in peft's LNTuning, copies of LayerNorms are in float32, in which optimizer steps are not lost.
        BaseTuner._cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)

    def config_of(self, adapter_name: str) -> ClassHeadConfig:
        """Returns the configuration of an adapter."""
        return cast(ClassHeadConfig, self.peft_config[adapter_name])

    @property
    def head(self) -> ClassHeadLayer:
        """The layer around the classifier's `class_head`."""
        return cast(ClassHeadLayer, self.model.get_submodule(HEAD))

    def set_stage(self, tunes_layer_norms: bool, adapter_name: str | None = None) -> None:
        """Sets what is trained of an adapter of two stages: its LayerNorms, or its head.

        Parameters of the head always require gradients, and get none while it is not used: data parallelism looks for
        them once, before the first step.
        """
        name = adapter_name or self.active_adapters[0]
        self.config_of(name).starts_later = tunes_layer_norms
        for layer in self._layers():
            if isinstance(layer, TunedLayerNorm) and name in layer.ln_tuning_layers:
                layer.ln_tuning_layers[name].requires_grad_(tunes_layer_norms)

    def start_head(self, adapter_name: str | None = None) -> None:
        """Starts the head of an adapter from the text embeddings of the tuned model."""
        name = adapter_name or self.active_adapters[0]
        self.head.head(name).reset(start_of(self.config_of(name), self.model))

    @torch.no_grad()
    def fit_head(self, image_embeds: torch.Tensor, labels: torch.Tensor, adapter_name: str) -> None:
        """Reads off (N, K, E) embeddings of K views of N training images, and (N,) labels, what a head needs."""
        head, config = self.head.head(adapter_name), self.config_of(adapter_name)
        device = head.class_embeds.device
        image_embeds, labels = image_embeds.to(device), labels.to(device)
        rows = head.start if isinstance(head, LinearHead) and config.pull else head.class_embeds

        def probabilities() -> torch.Tensor:  # (N, K, C), which are many values
            prediction = self.model.predict(image_embeds.flatten(0, 1), normalize(rows))
            return prediction.logits.softmax(dim=1).unflatten(0, image_embeds.shape[:2])

        head.fit(image_embeds, labels, probabilities)
        if config.head_type == CACHE:
            config.num_keys = len(labels)
            # the keys are new
            self.head.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise ValueError(MERGE_OBSTACLE)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            raise ValueError(MERGE_OBSTACLE)
        for path, module in list(self.model.named_modules()):
            if isinstance(module, self.tuner_layer_cls):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, module.get_base_layer())
                module.set_adapter([])  # the labels are those of the classifier's own classes again
        for name in [name for name, config in self.peft_config.items() if isinstance(config, ClassHeadConfig)]:
            del self.peft_config[name]
        if not self.peft_config:
            del self.model.peft_config
        return self.model

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.head.active_adapters:  # LayerNorms have chosen among their own adapters, if any
            self.set_adapter(self.head.active_adapters)

    def tensors_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Returns all tensors of an adapter, by their names in the state dict of the model."""
        return adapter_tensors(self, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Renames tensors as peft does, and checks them."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(state_dict, adapter_tensors(model, adapter_name), config, adapter_name)
        labels = [tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] == INDEX]
        if any(((tensor < 0) | (tensor >= len(config.class_names))).any() for tensor in labels):
            raise ValueError(
                f"The labels of the adapter's cache are no indices of its {len(config.class_names)} classes; the file "
                "is damaged, or not to be trusted."
            )
        return state_dict


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Returns all tensors of an adapter in `model`, by their names in its state dict."""
    tensors = {}
    for path, module in model.named_modules():
        if not isinstance(module, ClassHeadModel.tuner_layer_cls):
            continue
        for container in module.adapter_layer_names:
            if adapter_name in (parts := getattr(module, container)):
                prefix = f"{path}.{container}.{adapter_name}"
                own = (*parts[adapter_name].named_parameters(), *parts[adapter_name].named_buffers())
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in own}
    return tensors
