"""Puts learnable text embeddings into any model that has a CLIP text tower."""

from __future__ import annotations

import copy

import torch
from peft import PromptTuningInit
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers import AutoTokenizer

from ..class_prompts import DEFAULT_TEMPLATE, check_class_names, context_text, encode_words, pad_template
from .config import CLIPPromptTuningConfig
from .layer import CLIPTextLearnableEmbeddings, is_clip_text_embeddings


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

    prefix: str = "learnable_"
    tuner_layer_cls = CLIPTextLearnableEmbeddings
    target_module_mapping = {}  # targets are found by structure

    def _prepare_adapter_config(self, peft_config: CLIPPromptTuningConfig, model_config: dict):
        if not any(is_clip_text_embeddings(module) for module in self.model.modules()):
            raise ValueError(
                f"{type(self.model).__name__} has no CLIP text embeddings (a module with a token_embedding and a "
                "position_embedding table), so there is nothing to tune. Models that have them: CLIPModel, "
                "CLIPTextModel, CLIPTextModelWithProjection, CLIPForPromptClassification."
            )
        if not peft_config._loaded:
            _resolve(peft_config, self.model)
        elif peft_config.class_names is None:
            peft_config.class_names = _class_names_of(self.model)
        _check_fits(peft_config, self.model)
        return self._keep_copy(peft_config)

    def _keep_copy(self, peft_config):
        # The user may go on to use the same object for another model; class names are changed in ours.
        own = copy.copy(peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = own
        return own

    def _check_target_module_exists(self, peft_config, key):
        """By name where `target_modules` says so, otherwise by structure. The config keeps its `None`, so that one
        adapter file fits models that hold the embeddings at different paths."""
        if peft_config.target_modules is None:
            if not is_clip_text_embeddings(self.model.get_submodule(key)):
                return False
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = [key]  # exclude_modules has still to be heeded
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        if isinstance(target, CLIPTextLearnableEmbeddings):
            target.update_layer(adapter_name, peft_config)
            return
        if not is_clip_text_embeddings(target):
            raise ValueError(
                f"Target module {current_key!r} is a {type(target).__name__} and holds no CLIP text embeddings; leave "
                "target_modules out to find them."
            )
        new_module = CLIPTextLearnableEmbeddings(target, adapter_name, peft_config)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # peft's own would copy `weight` and `bias` over when it unloads; both modules here hold tables of their own,
        # and a new layer is made on the device of the module that it wraps.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Vectors are made in float32; whoever asks peft not to do that gets the base model's dtype.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, CLIPTextLearnableEmbeddings) and adapter_name in module.learnable_embeddings:
                parameter = module.learnable_embeddings[adapter_name]
                parameter.data = parameter.data.to(module.weight.dtype)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        layout = None
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            _check_known(names, self.peft_config)
            layout = self.peft_config[names[0]] if names else None
        else:
            self._restore_merged_rows()
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if layout is not None and hasattr(model, "adopt_prompt_layout"):
            model.adopt_prompt_layout(layout)  # the texts that the merged rows belong to
        return model

    def _restore_merged_rows(self) -> None:
        for module in self.model.modules():
            if isinstance(module, CLIPTextLearnableEmbeddings) and module.merged:
                module.unmerge()

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """As in peft, and for a text tower that sits at another path than where the adapter was trained
        (`embeddings` of a bare `CLIPTextModel`, `text_model.embeddings` elsewhere)."""
        expected = {
            f"{name}.learnable_embeddings.{adapter_name}": module.learnable_embeddings[adapter_name]
            for name, module in model.named_modules()
            if isinstance(module, CLIPTextLearnableEmbeddings) and adapter_name in module.learnable_embeddings
        }
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state_dict = {_key_at_other_path(key, adapter_name, expected): value for key, value in state_dict.items()}
        _check_tensors(state_dict, expected, config)
        return state_dict


def _resolve(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    """Fills in what depends on the model: template, number of vectors, token ids, class names."""
    config.forget_filled_in()
    given = config.to_dict()
    if config.prompt_template is None:
        config.prompt_template = _config_value(model, "prompt_template") or DEFAULT_TEMPLATE
    if config.class_names is None:
        config.class_names = _class_names_of(model)
    tokenizer = _tokenizer_for(config, model)
    init_ids = encode_words(config.prompt_tuning_init_text or "", tokenizer)
    if config.num_virtual_tokens is None:
        config.num_virtual_tokens = len(init_ids) or _room_in_template(config, tokenizer)
    elif init_ids and len(init_ids) != config.num_virtual_tokens:
        raise ValueError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has {len(init_ids)} tokens, but "
            f"num_virtual_tokens={config.num_virtual_tokens}; they must be equal. Leave num_virtual_tokens out to "
            "take as many as the text has."
        )
    n, start = config.num_virtual_tokens, config.start_idx
    config.padded_template = pad_template(config.prompt_template, n, tokenizer, start)
    context_ids = encode_words(context_text(config.padded_template), tokenizer)
    config.replaced_token_ids = context_ids[start - 1 : start - 1 + n]
    is_text = config.prompt_tuning_init is PromptTuningInit.TEXT
    config.init_token_ids = (init_ids or config.replaced_token_ids) if is_text else None
    config._filled_in = {name: getattr(config, name) for name, value in given.items() if value is None}


def _check_known(adapter_names: list[str], peft_config: dict) -> None:
    unknown = [name for name in adapter_names if name not in peft_config]
    if unknown:
        raise ValueError(f"There is no adapter {unknown[0]!r} to merge; the model has {sorted(peft_config)}.")


def _room_in_template(config: CLIPPromptTuningConfig, tokenizer) -> int:
    room = len(encode_words(context_text(config.prompt_template), tokenizer)) - (config.start_idx - 1)
    if room < 1:
        raise ValueError(
            f"The template {config.prompt_template!r} has no words from position {config.start_idx} up to the class "
            "name, so the number of vectors does not follow from it; give num_virtual_tokens."
        )
    return room


def _tokenizer_for(config: CLIPPromptTuningConfig, model: nn.Module):
    if config.tokenizer_name_or_path is None and getattr(model, "tokenizer", None) is not None:
        return model.tokenizer
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            f"The tokenizer is needed to find the template's tokens, but this {type(model).__name__} has no "
            "name_or_path to load it from; set tokenizer_name_or_path in CLIPPromptTuningConfig."
        )
    return AutoTokenizer.from_pretrained(name)


def _class_names_of(model: nn.Module) -> list[str] | None:
    names = _config_value(model, "class_names")
    return None if names is None else check_class_names(names)


def _config_value(model: nn.Module, name: str):
    return getattr(getattr(model, "config", None), name, None)  # not every module around a CLIP has a config


def _check_fits(config: CLIPPromptTuningConfig, model: nn.Module) -> None:
    end = config.start_idx + config.num_virtual_tokens
    for module in filter(is_clip_text_embeddings, model.modules()):
        num_positions, vocab_size = module.position_embedding.num_embeddings, module.token_embedding.num_embeddings
        if end + 1 >= num_positions:  # a class token and the end token must follow
            raise ValueError(
                f"start_idx={config.start_idx} and num_virtual_tokens={config.num_virtual_tokens} reach position "
                f"{end - 1}, but the text tower has {num_positions} positions and needs at least two after the "
                "vectors, for the class name and the end token; take fewer vectors."
            )
        if max(config.replaced_token_ids + (config.init_token_ids or [])) >= vocab_size:
            raise ValueError(
                f"The adapter names token {max(config.replaced_token_ids + (config.init_token_ids or []))}, but the "
                f"model's vocabulary has {vocab_size} tokens: the adapter belongs to another base model, or the "
                "tokenizer is not this model's."
            )


def _key_at_other_path(key: str, adapter_name: str, expected: dict) -> str:
    if key in expected:
        return key
    path, _, name = key.rpartition(".")  # keys of a file do not hold the adapter's name
    if name != "learnable_embeddings":
        return key
    path = path.removeprefix("base_model.model.")
    for candidate in expected:
        module_path = candidate.removesuffix(f".learnable_embeddings.{adapter_name}").removeprefix("base_model.model.")
        if f".{path}".endswith(f".{module_path}") or f".{module_path}".endswith(f".{path}"):
            return candidate
    return key


def _check_tensors(state_dict: dict, expected: dict[str, torch.Tensor], config: CLIPPromptTuningConfig) -> None:
    for key, parameter in expected.items():
        if key not in state_dict:
            raise ValueError(
                f"The adapter's weights hold no {key!r}, only {sorted(state_dict)}; the file is damaged or belongs to "
                "another method."
            )
        shape, wanted = tuple(state_dict[key].shape), tuple(parameter.shape)
        if shape != wanted:
            raise ValueError(
                f"The adapter's vectors have shape {shape}, but this model and the adapter's configuration ask for "
                f"{wanted} (num_virtual_tokens, text hidden size). The adapter was trained on "
                f"{config.base_model_name_or_path!r}; load that base model."
            )
