"""Fits the tensors of a saved adapter to the model at hand."""

from __future__ import annotations

import copy
import re

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..towers import Tower, embed_width
from .config import CLIPPromptTuningConfig
from .files import check_values
from .layer import CLIPPromptLayer, CLIPTextLearnableEmbeddings
from .layout import adopt_task, check_fits, check_towers, chosen_towers, resolve
from .vectors import CLIPDeepPrompts, CLIPVectorsLayer, CLIPVisionLearnableEmbeddings


PREFIX = "learnable_"  # of every container of adapter tensors


PEFT_PATH = "base_model.model."


def expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """All tensors of an adapter in `model`, by their names in its state dict."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, CLIPPromptLayer)
        for name, parameter in module.parameters_of(adapter_name)
    }


def rename_to_expected(state_dict: dict, expected: dict) -> dict:
    """Renames tensors that were trained in a tower at another path: `embeddings...` of a bare `CLIPTextModel`,
    `text_model.embeddings...` elsewhere."""
    return {_key_at_other_path(key, expected): value for key, value in state_dict.items()}


def check_tensors(
    state_dict: dict, expected: dict[str, torch.Tensor], config: CLIPPromptTuningConfig, adapter_name: str
) -> None:
    """Raises `ValueError` if a tensor is missing or one too many, has another shape than the model and the
    configuration ask for, or holds what no training gives."""
    for key, parameter in expected.items():
        if key not in state_dict:
            raise ValueError(
                f"The adapter's weights hold no {key!r}, only {sorted(state_dict)}; the file is damaged or belongs to "
                "another method."
            )
        shape, wanted = tuple(state_dict[key].shape), tuple(parameter.shape)
        if shape != wanted:
            raise ValueError(
                f"The adapter's {key!r} has shape {shape}, but this model and the adapter's configuration ask for "
                f"{wanted} (num_virtual_tokens, class_names, hidden sizes). The adapter was trained on "
                f"{config.base_model_name_or_path!r}; load that base model."
            )
    check_values(state_dict)
    for key in state_dict:
        if key not in expected and f".modules_to_save.{adapter_name}." not in key:
            raise ValueError(
                f"The adapter's weights hold {key!r}, which its configuration does not ask for and which could change "
                "the frozen model; the file is damaged, or not to be trusted."
            )


def _key_at_other_path(key: str, expected: dict) -> str:
    if key in expected or f".{PREFIX}" not in key:
        return key
    path, name = _split(key)
    for candidate in expected:
        other_path, other_name = _split(candidate)
        same_name = name == _without_adapter(other_name)  # keys of a file do not hold the adapter's name
        if same_name and (path.endswith(other_path) or other_path.endswith(path)):
            return candidate
    return key


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.removeprefix(PEFT_PATH).partition(f".{PREFIX}")
    return f".{path}", name


def _without_adapter(name: str) -> str:
    container, _, rest = name.partition(".")
    return ".".join([container, *rest.split(".")[1:]])


ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class CLIPPromptTuningModel(BaseTuner):
    """
    Creates a prompt-tuned CLIP from a pretrained one.

    Args:
        model ([`torch.nn.Module`]): a `CLIPModel`, `CLIPTextModel`, `CLIPTextModelWithProjection`,
            `CLIPForPromptClassification`, or anything else that holds CLIP text embeddings.
        config ([`CLIPPromptTuningConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

    ```py
    >>> from transformers import CLIPModel
    >>> from peft import get_peft_model
    >>> from clip_prompt_peft import CLIPPromptTuningConfig

    >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    >>> model = get_peft_model(clip, CLIPPromptTuningConfig(prompt_template="a photo of a {}."))
    >>> model.print_trainable_parameters()
    trainable params: 2,048 || all params: 151,279,361 || trainable%: 0.0014
    ```
    """

    prefix: str = PREFIX
    tuner_layer_cls = CLIPPromptLayer
    target_module_mapping = {}  # targets are found by structure

    def _prepare_adapter_config(self, peft_config: CLIPPromptTuningConfig, model_config: dict):
        check_towers(peft_config, self.model)
        if peft_config._loaded:
            adopt_task(peft_config, self.model)
        else:
            resolve(peft_config, self.model)
        check_fits(peft_config, self.model)
        vision_depth = peft_config.vision_prompt_depth if peft_config.num_vision_virtual_tokens else 0
        self._text_targets = _targets(chosen_towers(peft_config, self.model, "text"), peft_config.text_prompt_depth)
        self._vision_targets = _targets(chosen_towers(peft_config, self.model, "vision"), vision_depth)
        self._check_coupled_layers(peft_config)
        return self._keep_copy(peft_config)

    def _check_coupled_layers(self, peft_config) -> None:
        keys = (*self._text_targets, *self._vision_targets) if peft_config.vision_prompts_from_text else ()
        excluded = [key for key in keys if not self._check_target_module_exists(peft_config, key)]
        if excluded:
            raise ValueError(
                f"exclude_modules leaves out {excluded[0]!r}, but with vision_prompts_from_text each text layer and "
                "the image layer that maps it belong together; exclude none of them."
            )

    def _keep_copy(self, peft_config):
        # The user may go on to use the same object for another model; class names are changed in ours.
        own = copy.copy(peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = own
        return own

    def _check_target_module_exists(self, peft_config, key):
        """By structure, and by `target_modules` and `exclude_modules`. The config keeps its `target_modules`, so that
        one adapter file fits models that hold the embeddings at different paths."""
        by_name = copy.copy(peft_config)
        by_name.target_modules = [key] if key in self._text_targets or key in self._vision_targets else []
        return check_target_module_exists(by_name, key)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        in_text = current_key in self._text_targets
        depth, tower = (self._text_targets if in_text else self._vision_targets)[current_key]
        if in_text and depth == 0:
            new_module = self._add_text_embeddings(target, adapter_name, peft_config)
        elif in_text:
            new_module = _wrapped(target, CLIPDeepPrompts, adapter_name, at_end=False)
            new_module.update_layer(adapter_name, peft_config, peft_config.num_virtual_tokens, tower.like)
        else:
            layer_class, options = (
                (CLIPDeepPrompts, {"at_end": True}) if depth else (CLIPVisionLearnableEmbeddings, {})
            )
            new_module = _wrapped(target, layer_class, adapter_name, **options)
            if peft_config.vision_prompts_from_text:
                new_module.couple(adapter_name, peft_config, self._text_width(), tower.like)
            else:
                n = peft_config.num_vision_virtual_tokens
                new_module.update_layer(adapter_name, peft_config, n, tower.like)
        if new_module is not target:
            if any(module.disable_adapters for module in self.model.modules() if isinstance(module, CLIPPromptLayer)):
                new_module.enable_adapters(False)  # as all others are
            self._replace_module(parent, target_name, new_module, target)

    def _add_text_embeddings(self, target, adapter_name, peft_config) -> CLIPTextLearnableEmbeddings:
        image_width = embed_width(getattr(self.model, "config", None))
        if isinstance(target, CLIPTextLearnableEmbeddings):
            target.update_layer(adapter_name, peft_config, image_width)
            return target
        return CLIPTextLearnableEmbeddings(target, adapter_name, peft_config, image_width)

    def _text_width(self) -> int:
        return next(tower.like.shape[-1] for _, tower in self._text_targets.values())

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        _check_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].vision_prompts_from_text:
            self._connect_towers(adapter_name)

    def _connect_towers(self, adapter_name: str) -> None:
        """Tells each coupled vision layer which text layer it maps."""
        text_layers = {depth: self.model.get_submodule(key) for key, (depth, _) in self._text_targets.items()}
        vision_layers = {depth: self.model.get_submodule(key) for key, (depth, _) in self._vision_targets.items()}
        for depth, layer in vision_layers.items():
            layer.text_sources[adapter_name] = text_layers[depth]
            if depth > 1 and not self.peft_config[adapter_name]._loaded:
                # MaPLe starts the maps of all deeper layers from one
                first = vision_layers[1].learnable_projections[adapter_name]
                layer.learnable_projections[adapter_name].load_state_dict(first.state_dict())

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # peft's own would copy `weight` and `bias` over when it unloads; all modules here hold tensors of their own,
        # and a new layer is made on the device of the tower that it belongs to.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Vectors are made in float32; whoever asks peft not to do that gets the base model's dtype.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        dtype = next(tower.like.dtype for _, tower in self._text_targets.values())
        for parameter in expected_tensors(self.model, adapter_name).values():
            parameter.data = parameter.data.to(dtype)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        layout = None
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            _check_known(names, self.peft_config)
            layout = self.peft_config[names[0]] if names else None
        else:
            self._restore_base_weights()
        options = {"progressbar": progressbar, "safe_merge": safe_merge, "adapter_names": adapter_names}
        model = super()._unload_and_optionally_merge(merge=merge, **options)
        if any(isinstance(module, ADAPTERS) for module in model.modules()):
            # peft does not look inside of the layers that it unloads, and ours hold whole layers of CLIP, which may
            # hold layers of other methods
            model = super()._unload_and_optionally_merge(merge=merge, **options)
        if layout is not None and hasattr(model, "adopt_prompt_layout"):
            model.adopt_prompt_layout(layout)  # the texts that the merged rows belong to
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:  # each layer has chosen among those that it holds, which may differ
            self.set_adapter(self.active_adapters)

    def _restore_base_weights(self) -> None:
        for module in self.model.modules():
            if isinstance(module, CLIPTextLearnableEmbeddings) and module.merged:
                module.unmerge()
            elif isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # otherwise peft leaves the trained module in the model

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """As in peft, and for a tower that sits at another path than where the adapter was trained."""
        expected = expected_tensors(model, adapter_name)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state_dict = rename_to_expected(state_dict, expected)
        check_tensors(state_dict, expected, config, adapter_name)
        return state_dict


def _targets(towers: list[Tower], depth: int) -> dict[str, tuple[int, Tower]]:
    """Where prompts go: by module path, the depth (0 the embeddings, i > 0 encoder layer i) and the tower."""
    return {
        path: (i, tower)
        for tower in towers
        for i, path in enumerate([tower.embeddings_key, *tower.layer_keys[1:]][:depth])
    }


def _wrapped(target: nn.Module, layer_class: type[CLIPVectorsLayer], adapter_name: str, **options) -> CLIPVectorsLayer:
    return target if isinstance(target, layer_class) else layer_class(target, adapter_name, **options)


def _check_name(adapter_name: str) -> None:
    if not adapter_name or re.search(r"[./\\\x00]", adapter_name):
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}: a module and a folder are named after it, so it must not "
            "be empty nor hold '.', '/' or a backslash."
        )


def _check_known(adapter_names: list[str], peft_config: dict) -> None:
    unknown = [name for name in adapter_names if name not in peft_config]
    if unknown:
        raise ValueError(f"There is no adapter {unknown[0]!r} to merge; the model has {sorted(peft_config)}.")
