"""The tuner: injects prompts into a model with a CLIP text tower, merges them, and fits saved tensors to the model."""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..heads import ImageHead
from ..towers import Tower, find_towers, has_adapters
from .base_layer import CLIPPromptLayer
from .base_model import check_adapter_name, forget_if_refused, warn_of_other_classes
from .config import CLIPPromptTuningConfig
from .files import check_tensors
from .layer import CLIPTextLearnableEmbeddings
from .layout import PromptLayout, chosen_towers, embed_width_of, find_heads, resolve
from .projection import CLIPProjectedImages, CLIPTeacherClasses
from .quantized import check_passes_gradients, keep_trainable
from .vectors import CLIPDeepPrompts, CLIPVisionLearnableEmbeddings


PREFIX = "learnable_"  # of all containers of adapter tensors
PEFT_PATH = "base_model.model."
COMPILED = "_orig_mod."  # torch.compile puts it in front of all names
# what torch.compile, data parallelism, FSDP and activation checkpointing put into the names of what they wrap
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class CLIPPromptTuningModel(BaseTuner):
    """
    Creates a prompt-tuned model from a pretrained CLIP.

    Args:
        model ([`torch.nn.Module`]):
            A `CLIPModel`, `CLIPTextModel`, `CLIPTextModelWithProjection`, `CLIPForPromptClassification`, or any other
            model that holds CLIP text embeddings.
        config ([`CLIPPromptTuningConfig`]):
            The configuration.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter.

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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        check_adapter_name(adapter_name)
        # peft activates the first adapter of a tuner, and transformers makes a new tuner for each adapter.
        self._becomes_active, self._injected = not hasattr(self, "_injected"), adapter_name
        with forget_if_refused(self, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._wrap_without_tensors(adapter_name)
        if self.peft_config[adapter_name].vision_prompts_from_text:
            self._connect_towers(adapter_name)

    def _wrap_without_tensors(self, adapter_name: str) -> None:
        """Wraps text embeddings that get no vectors: given a `state_dict`, peft wraps only what has tensors in it."""
        config = self.peft_config[adapter_name]
        for key in self._text_targets if config.num_virtual_tokens == 0 else ():
            target = self.model.get_submodule(key)
            is_wrapped = isinstance(target, CLIPPromptLayer) and adapter_name in target.prompt_layouts
            if not is_wrapped and self._check_target_module_exists(config, key):
                parent, _, name = key.rpartition(".")
                parent = self.model.get_submodule(parent)
                self._create_and_replace(config, adapter_name, target, name, parent, current_key=key)
                self.targeted_module_names.append(key)

    def _prepare_adapter_config(self, peft_config: CLIPPromptTuningConfig, model_config: dict):
        keep_trainable(self.model)
        resolved = resolve(peft_config, self.model)
        if not peft_config.inference_mode:
            check_passes_gradients(self.model, next(iter(find_towers(self.model, "text"))).like.dtype)
        if self._becomes_active and peft_config.has_weights:
            warn_of_other_classes(resolved, self.model)
        self.peft_config[self._injected] = resolved  # a copy: the user may use the same object for another model
        self._is_new = not peft_config.has_weights
        self._layout = PromptLayout.of(resolved)
        vision_depth = resolved.vision_prompt_depth if resolved.num_vision_virtual_tokens else 0
        self._text_targets = _targets(
            chosen_towers(resolved, self.model, "text"), resolved.text_prompt_depth, resolved.class_aware_layer
        )
        self._vision_targets = _targets(chosen_towers(resolved, self.model, "vision"), vision_depth)
        self._heads = () if resolved.projection_dim is None else find_heads(self.model)
        self._check_modules_to_save(resolved)
        self._check_coupled_layers(resolved)
        return resolved

    def _check_coupled_layers(self, peft_config) -> None:
        keys = (*self._text_targets, *self._vision_targets) if peft_config.vision_prompts_from_text else ()
        excluded = [key for key in self._heads if not self._check_target_module_exists(peft_config, key)]
        if excluded:
            raise ValueError(
                f"exclude_modules leaves out {excluded[0]!r}, but projection_dim={peft_config.projection_dim} needs "
                "both heads; do not exclude them."
            )
        excluded = [key for key in keys if not self._check_target_module_exists(peft_config, key)]
        if excluded:
            raise ValueError(
                f"exclude_modules leaves out {excluded[0]!r}, but with vision_prompts_from_text each text layer and "
                "the image layer that maps it belong together; exclude none of them."
            )

    def _check_modules_to_save(self, peft_config) -> None:
        # peft would leave such modules, or the prompts, out without a word, or break off with half of the layers made.
        for name in peft_config.modules_to_save or ():
            keys = [key for key, _ in self.model.named_modules() if key.replace(".base_layer", "").endswith(name)]
            for target in (*self._text_targets, *self._vision_targets, *self._heads):
                key = next((key for key in keys if f"{key}.".startswith(f"{target}.")), None)
                key = key or next((key for key in keys if target.startswith(f"{key}.")), None)
                if key is not None:
                    raise ValueError(
                        f"modules_to_save={name!r} names {key!r}, but prompts are put into {target!r}, which cannot "
                        "be copied to train it beside them, in whole or in part. Leave the name out; LoRA can train "
                        "the token table beside prompts."
                    )

    def _check_target_module_exists(self, peft_config, key):
        """Finds targets by structure, then applies `exclude_modules`.

        The configuration keeps its own `target_modules`, so that one adapter file fits models that hold the embeddings
        at different paths.
        """
        by_name = copy.copy(peft_config)
        targets = {*self._text_targets, *self._vision_targets, *self._heads}
        by_name.target_modules = [key] if key in targets or COMPILED + key in targets else []  # peft took it off
        return check_target_module_exists(by_name, key)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        if current_key not in {*self._text_targets, *self._vision_targets, *self._heads}:
            current_key = COMPILED + current_key  # peft has taken the prefix off
        if current_key in self._heads:
            layer = self._add_to_head(target, adapter_name, peft_config)
        else:
            layer = self._add_to_tower(target, adapter_name, peft_config, current_key)
        if self._is_new:
            layer.reset_adapter_parameters(adapter_name, peft_config)
        else:
            layer.await_weights(adapter_name)
        if layer is not target:
            if any(module.disable_adapters for module in self.model.modules() if isinstance(module, CLIPPromptLayer)):
                layer.enable_adapters(False)  # as all other layers are
            self._replace_module(parent, target_name, layer, target)

    def _add_to_head(self, target, adapter_name, peft_config) -> CLIPPromptLayer:
        like = next(tower.like for _, tower in self._text_targets.values())
        is_new = not isinstance(target, CLIPPromptLayer)
        if isinstance(target.get_base_layer() if not is_new else target, ImageHead):
            layer = CLIPProjectedImages(target, adapter_name) if is_new else target
            layer.update_layer(adapter_name, self._layout, embed_width_of(self.model), like)
        else:
            layer = CLIPTeacherClasses(target, adapter_name) if is_new else target
            layer.update_layer(adapter_name, self._layout, peft_config, like)
        return layer

    def _add_to_tower(self, target, adapter_name, peft_config, current_key) -> CLIPPromptLayer:
        in_text = current_key in self._text_targets
        depth, tower = (self._text_targets if in_text else self._vision_targets)[current_key]
        if in_text and depth == 0:
            layer = self._add_to_text_embeddings(target, adapter_name, peft_config)
        else:
            layer = target if isinstance(target, CLIPPromptLayer) else _new_layer(target, adapter_name, in_text, depth)
            n = peft_config.num_virtual_tokens if in_text else peft_config.num_vision_virtual_tokens
            is_coupled = peft_config.vision_prompts_from_text and not in_text
            is_class_aware = in_text and depth == peft_config.class_aware_layer
            widths = {"text_width": self._text_width()} if is_coupled else {}
            if is_class_aware:
                widths["class_width"] = embed_width_of(self.model)
            layer.update_layer(adapter_name, self._layout, n, tower.like, **widths)
        return layer

    def _add_to_text_embeddings(self, target, adapter_name, peft_config) -> CLIPTextLearnableEmbeddings:
        image_width = embed_width_of(self.model)
        if isinstance(target, CLIPTextLearnableEmbeddings):
            target.update_layer(adapter_name, self._layout, image_width)
        else:
            target = CLIPTextLearnableEmbeddings(target, adapter_name, self._layout, image_width)
        target.prompt_configs[adapter_name] = peft_config
        classifier = next((part for part in self.model.modules() if hasattr(part, "adopt_prompt_layout")), None)
        if classifier is not None:
            target.label_with(classifier.config)
        return target

    def _text_width(self) -> int:
        return next(tower.like.shape[-1] for _, tower in self._text_targets.values())

    def _connect_towers(self, adapter_name: str) -> None:
        """Tells each coupled vision layer which text layer it maps."""
        text_layers = {depth: self.model.get_submodule(key) for key, (depth, _) in self._text_targets.items()}
        vision_layers = {depth: self.model.get_submodule(key) for key, (depth, _) in self._vision_targets.items()}
        for depth, layer in vision_layers.items():
            layer.text_sources[adapter_name] = text_layers[depth]
            if depth > 1 and self._is_new:
                # MaPLe starts the maps of all deeper layers from the same values.
                first = vision_layers[1].learnable_projections[adapter_name]
                layer.learnable_projections[adapter_name].load_state_dict(first.state_dict())

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # peft's own method would copy `weight` and `bias` to the wrapped module when it unloads. All modules here hold
        # their own tensors, and a new layer is made on the device of its tower.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Vectors are made in float32. With autocast_adapter_dtype=False they get the dtype of the base model.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        dtype = next(tower.like.dtype for _, tower in self._text_targets.values())
        for parameter in adapter_tensors(self.model, adapter_name).values():
            parameter.data = parameter.data.to(dtype)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        layout = calibrated = None
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            unknown = [name for name in names if name not in self.peft_config]
            if unknown:
                raise ValueError(
                    f"There is no adapter {unknown[0]!r} to merge; the model has {sorted(self.peft_config)}."
                )
            layout = PromptLayout.of(self.peft_config[names[0]]) if names else None
            calibrated = self.peft_config[names[0]] if len(names) == 1 else None  # of several, nothing is known
        else:
            self._restore_base_weights()
        text_layers = [part for part in self.model.modules() if isinstance(part, CLIPTextLearnableEmbeddings)]
        options = {"progressbar": progressbar, "safe_merge": safe_merge, "adapter_names": adapter_names}
        model = super()._unload_and_optionally_merge(merge=merge, **options)
        if has_adapters([model]):
            # peft does not look inside of the layers that it unloads. Those of deep prompts hold whole layers of CLIP,
            # which may hold layers of other methods.
            model = super()._unload_and_optionally_merge(merge=merge, **options)
        for layer in text_layers:  # no longer in the model; the labels are those of its own classes again
            layer.set_adapter([])
        if layout is not None and hasattr(model, "adopt_prompt_layout"):
            model.adopt_prompt_layout(layout, calibrated)  # the merged rows belong to its texts
        return model

    def _restore_base_weights(self) -> None:
        for module in self.model.modules():
            if isinstance(module, CLIPTextLearnableEmbeddings) and module.merged:
                module.unmerge()
            elif isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # otherwise peft leaves the trained module in the model

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:  # each layer has chosen among its own adapters, which may differ
            self.set_adapter(self.active_adapters)

    def tensors_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Returns all tensors of an adapter, by their names in the state dict of the model."""
        return adapter_tensors(self, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Renames tensors as peft does, also for a tower at another path than in training, and checks them."""
        expected = adapter_tensors(model, adapter_name)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state_dict = {_key_at_other_path(key, expected): value for key, value in state_dict.items()}
        check_tensors(state_dict, expected, config, adapter_name)
        return state_dict


def _targets(towers: list[Tower], depth: int, further: int | None = None) -> dict[str, tuple[int, Tower]]:
    """Returns the modules to wrap: by path, the depth (0 for embeddings, i > 0 for encoder layer i) and the tower.

    They are the embeddings and layers up to `depth`, and the layer with the index `further`.
    """
    return {
        path: (i, tower)
        for tower in towers
        for i, path in enumerate([tower.embeddings_key, *tower.layer_keys[1:]])
        if i < depth or i == further
    }


def _new_layer(target: nn.Module, adapter_name: str, in_text: bool, depth: int) -> CLIPPromptLayer:
    if depth:
        return CLIPDeepPrompts(target, adapter_name, at_end=not in_text)
    return CLIPVisionLearnableEmbeddings(target, adapter_name)


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Returns all tensors of an adapter in `model`, by their names in its state dict."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, CLIPPromptLayer)
        for name, parameter in module.parameters_of(adapter_name)
    }


def _key_at_other_path(key: str, expected: dict) -> str:
    """Renames a tensor of a tower at another path: `embeddings` in a `CLIPTextModel`, `text_model.embeddings` else."""
    if key in expected or f".{PREFIX}" not in key:
        return key
    path, name = _split(key)
    for candidate in expected:
        other_path, other_name = _split(candidate)
        container, _, rest = other_name.partition(".")
        without_adapter = ".".join([container, *rest.split(".")[1:]])  # keys in a file do not name the adapter
        if name == without_adapter and (path.endswith(other_path) or other_path.endswith(path)):
            return candidate
    return key


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.partition(f".{PREFIX}")
    path = ".".join(part for part in path.split(".") if part not in WRAPPERS)
    return f".{path.removeprefix(PEFT_PATH)}", name
