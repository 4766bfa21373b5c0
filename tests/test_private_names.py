"""Names of other libraries that their documentation does not promise, and that this package uses nevertheless.

Each row says what stops working when the name goes or changes; the last test finds names that are missing here.
"""

import ast
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model

import clip_prompt_peft as package


# Documented, if not at the top level: nothing to list.
PUBLIC = {
    "peft.utils",
    "torch.nn",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "torch.distributed",
    "torch.overrides",
    "transformers.modeling_outputs",
}

IMPORTED = {
    "peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "get_peft_model would give a plain PeftModel: no card",
    "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING": "no adapter could be loaded: its peft_type would be unknown",
    "peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING": "saving and loading would not find the adapter's tensors",
    "peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING": "no adapter could be injected",
    "peft.tuners.tuners_utils.BaseTuner": "there would be no tuner",
    "peft.tuners.tuners_utils.BaseTunerLayer": "layers would not be switched, disabled, merged and unloaded",
    "peft.tuners.tuners_utils.check_adapters_to_merge": "merging would not skip what is merged already",
    "peft.tuners.tuners_utils.check_target_module_exists": "target_modules and exclude_modules would not be heeded",
    "peft.tuners.ln_tuning.layer.LNTuningLayer": "LayerNorms would not be left alone where an adapter tunes none",
    "peft.utils.other.AuxiliaryTrainingWrapper": "modules_to_save would be missed by cache, mixed batches and unload",
    "torch.autograd.function.once_differentiable": "second derivatives through chunks of classes would be wrong",
    "torch.autograd.forward_ad": "a captured graph would drop tangents of forward-mode differentiation",
    "torch.nn.modules.module._global_backward_hooks": "hooks for all modules would miss the text model",
    "torch.nn.modules.module._global_backward_pre_hooks": "hooks for all modules would miss the text model",
    "torch.nn.modules.module._global_forward_hooks": "hooks for all modules would miss the text model",
    "torch.nn.modules.module._global_forward_pre_hooks": "hooks for all modules would miss the text model",
    "torch.utils.checkpoint.checkpoint": "chunks of classes for single images would not fit into memory",
    "torch.utils.checkpoint.get_device_states": "dropout would differ when a chunk of classes is computed again",
    "torch.utils._python_dispatch._get_current_dispatch_mode": "tracers and counters would miss a captured encoder",
    "torch.utils.checkpoint.set_device_states": "dropout would differ when a chunk of classes is computed again",
    "transformers.trainer.OPTIMIZER_NAME": "a half-written checkpoint would be taken for a whole one",
    "transformers.trainer.SCHEDULER_NAME": "a half-written checkpoint would be taken for a whole one",
    "transformers.trainer.TRAINER_STATE_NAME": "a half-written checkpoint would be taken for a whole one",
    "transformers.models.groupvit.modeling_groupvit.GroupViTTextTransformer": "GroupViT's prompts: not packed",
    "transformers.pipelines.PIPELINE_REGISTRY": "pipeline would not know the task prompt-image-classification",
    "transformers.trainer_callback.ExportableState": "averaging over epochs would not survive a resumed training",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": "the last whole checkpoint would not be found",
    "transformers.image_utils.ChannelDimension": "arrays of shape (C, H, W) could not be told from (H, W, C)",
    "transformers.image_utils.infer_channel_dimension_format": "the same",
    "transformers.utils.cached_file": "AutoPeftModelForPromptClassification would not find files on the Hub",
    "transformers.utils.can_return_tuple": "return_dict=False would not give a tuple",
    "transformers.utils.extract_commit_hash": "config and weights could come from different commits",
    "transformers.utils.find_adapter_config_file": "a folder of an adapter could not be told from one of a base model",
    "transformers.utils.logging": "progress bars of loading could not be kept quiet",
    "accelerate.utils.align_module_device": "offloaded vectors, and devices of offloaded weights, would not be read",
    "accelerate.utils.has_offloaded_params": "vectors could be merged into a table that is then read without them",
    "datasets.fingerprint.Hasher": "embeddings would be computed again, or taken from another model's",
    "datasets.exceptions.DatasetGenerationError": "a damaged table would be a traceback without its name",
    "huggingface_hub.utils.HFValidationError": "a path could not be told from a Hub id",
    "huggingface_hub.utils.validate_repo_id": "a path could not be told from a Hub id",
    "huggingface_hub.errors.EntryNotFoundError": "a repository without a card could not be pushed to",
    "huggingface_hub.errors.RevisionNotFoundError": "a missing revision would be told in the library's words",
}

# method of a base class: what our override does
OVERRIDDEN = {
    "BaseTuner._cast_adapter_dtype": "autocast_adapter_dtype=False would leave the vectors in float32",
    "BaseTuner._check_target_module_exists": "targets would be looked for by name and not by structure",
    "BaseTuner._create_and_replace": "no layer would be made",
    "BaseTuner._prepare_adapter_config": "the configuration would not be resolved",
    "BaseTuner._remap_adapter_state_dict_for_load": "an adapter of a tower at another path would not be loaded",
    "BaseTuner._replace_module": "unloading would copy weights over",
    "BaseTuner._unload_and_optionally_merge": "unload would leave merged rows, and LoRA in deep layers",
    "LNTuningModel._create_new_module": "LayerNorms would not be left alone where an adapter tunes none",
    "Module._load_from_state_dict": "an adapter whose weights were never loaded would be used",
    "Pipeline._sanitize_parameters": "the pipeline would not take a coverage; transformers documents it for pipelines",
    "Trainer._set_signature_columns_if_needed": "the columns of a teacher would be removed from a data set",
}


def package_trees():
    for path in sorted((ROOT / "clip_prompt_peft").rglob("*.py")):
        yield path, ast.parse(path.read_text())


def imported_names():
    libraries = re.compile(r"(peft|torch|transformers|accelerate|datasets|huggingface_hub)\.")
    return {
        f"{node.module}.{alias.name}"
        for _, tree in package_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and libraries.match(node.module)
        if node.module not in PUBLIC
        for alias in node.names
    }


def overridden_names():
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not re.search(r"\.(report|export|metrics|commands)(\.|$)", info.name)  # of other packages
    ]
    classes = {c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__}
    for our_class in classes:
        for name in filter(re.compile(r"_[a-z]\w*[a-z]$").match, vars(our_class)):
            base = next((base for base in our_class.__mro__[:0:-1] if name in vars(base)), our_class)
            ours, theirs = getattr(our_class, name), getattr(base, name)
            if (
                not base.__module__.startswith(package.__name__)
                and inspect.isroutine(ours)
                and inspect.isroutine(theirs)
            ):
                yield f"{base.__name__}.{name}", ours, theirs


def foreign_attributes():
    """Underscore attributes that the package reads and does not define."""
    read, defined = set(), set()
    for _, tree in package_trees():
        pieces = {piece for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                defined |= {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
                defined |= {
                    name.id
                    for name in ast.walk(node)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                }
            elif isinstance(node, ast.Attribute):
                (read if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                read.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
                read.add(node.value)
    return {name for name in read - defined if re.fullmatch(r"_[a-z]\w*", name)}


@pytest.mark.parametrize("name", IMPORTED)
def test_the_imported_name_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{name} is gone: {IMPORTED[name]}."


def test_overridden_methods_are_called_as_they_were():
    found = set()
    for name, ours, theirs in overridden_names():
        found.add(name)
        required = {p.name for p in inspect.signature(theirs).parameters.values() if p.default is p.empty}
        takes = inspect.signature(ours).parameters
        is_compatible = required <= takes.keys() or any(p.kind is p.VAR_POSITIONAL for p in takes.values())
        assert is_compatible, f"{name} takes other arguments now: {OVERRIDDEN.get(name)}."
    assert found == OVERRIDDEN.keys(), "a base class has lost a method that is overridden here, or a row is missing"


# Attributes, each with what it is needed for


def attention_implementation(clip):
    """`config._attn_implementation`: packed rows would not know whether the attention adds a mask as it is."""
    assert clip.text_model.config._attn_implementation in ("sdpa", "eager")


def tensor_version(clip):
    """`Tensor._version`: class embeddings would be kept although a frozen weight has been written to."""
    weight = clip.text_projection.weight.detach()
    version = weight._version
    weight.add_(1)
    assert weight._version > version


def tensors_and_children_of_a_module(clip):
    """`Module._parameters`, `_buffers`, `_modules`: what class embeddings depend on would not be found. They are read
    in place of `named_parameters()`, which leaves out what is shared and takes a multiple of the time. A frozen
    copy for test-time tuning would share its parts with the model."""
    assert clip.text_projection._parameters["weight"] is clip.text_projection.weight
    assert clip.text_model.embeddings._buffers["position_ids"] is clip.text_model.embeddings.position_ids
    assert clip._modules["text_model"] is clip.text_model


def hooks_of_a_module(clip):
    """`Module._forward_hooks`, `_forward_pre_hooks` and those of backward: they would see packed prompts, or none."""
    hooks = [clip.register_forward_hook(print), clip.register_forward_pre_hook(print)]
    hooks += [clip.register_full_backward_hook(print), clip.register_full_backward_pre_hook(print)]
    assert list(clip._forward_hooks.values()) == list(clip._forward_pre_hooks.values()) == [print]
    assert list(clip._backward_hooks.values()) == list(clip._backward_pre_hooks.values()) == [print]
    for hook in hooks:
        hook.remove()


def hooks_of_transformers(clip):
    """`transformers.utils.output_capturing`: after a call with `output_attentions`, prompts would not be packed."""
    clip.text_model(torch.tensor([[0, 1]]), output_attentions=True)
    hooks = [hook for module in clip.text_model.modules() for hook in module._forward_hooks.values()]
    assert {hook.__module__ for hook in hooks} == {"transformers.utils.output_capturing"}


def parts_of_a_text_model(clip):
    """`CLIPTextModel.encoder`, `final_layer_norm`: packed prompts would have other embeddings. They are run one after
    the other, since the text model takes token ids only."""
    ids = torch.tensor([[0, 5, 7, 1]])
    embeds = clip.text_model.embeddings(input_ids=ids)
    mask = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min).triu(1)
    states = clip.text_model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    expected = clip.text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(clip.text_model.final_layer_norm(states), expected)


def adapter_mark_of_transformers(clip):
    """`PreTrainedModel._hf_peft_config_loaded`: a classifier with an adapter would save all of its weights."""
    assert clip._hf_peft_config_loaded is False
    clip.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert clip._hf_peft_config_loaded is True


def missing_entries(clip):
    """`cached_file(..., _raise_exceptions_for_missing_entries=False)`: pickled weights would not be told apart."""
    from transformers.utils import cached_file

    assert cached_file(ROOT, "no_such_file", _raise_exceptions_for_missing_entries=False) is None


def active_adapter_of_a_layer(clip):
    """`BaseTunerLayer._active_adapter`: a new layer would start without an active adapter."""
    layer = next(
        module
        for module in get_peft_model(clip, LoraConfig(target_modules=["q_proj"])).modules()
        if hasattr(module, "lora_A")
    )
    assert layer._active_adapter == ["default"] == layer.active_adapters


def wrapped_names(clip):
    """`base_layer`, `original_module`: frozen weights under an adapter would be taken for the adapter's."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["text_projection"])
    names = [name for name, _ in get_peft_model(clip, config).named_modules()]
    assert any(name.endswith("q_proj.base_layer") for name in names)
    assert any(name.endswith("text_projection.original_module") for name in names)


def names_of_wrappers(clip):
    """`_orig_mod`, `_checkpoint_wrapped_module`, `_fsdp_wrapped_module`: adapters saved inside would not be loaded."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

    assert "_orig_mod.weight" in torch.compile(torch.nn.Linear(1, 1)).state_dict()
    assert "_checkpoint_wrapped_module" in dict(checkpoint_wrapper(torch.nn.Linear(1, 1)).named_modules())
    assert FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"


def hooks_of_accelerate(clip):
    """`_hf_hook` marks a forward of accelerate: embeddings of models with a `device_map` would not be cached."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    hook = ModelHook()
    add_hook_to_module(clip.visual_projection, hook)
    assert clip.visual_projection._hf_hook is hook and "forward" in vars(clip.visual_projection)


def components_of_a_pipeline(clip):
    """`Pipeline._load_tokenizer`: a pipeline would not give a classifier the tokenizer of the revision asked for."""
    from transformers import Pipeline

    assert Pipeline._load_tokenizer is None


def transforms_of_torch(clip):
    """`torch._C._are_functorch_transforms_active`, `forward_ad._current_level`: transforms would meet a captured class
    encoder, which they cannot follow."""
    from torch.autograd import forward_ad

    seen = []
    torch.func.vmap(lambda x: seen.append(torch._C._are_functorch_transforms_active()) or x)(torch.ones(2))
    assert seen == [True] and not torch._C._are_functorch_transforms_active()
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0


def disabled_adapters_of_a_layer(clip):
    """`BaseTunerLayer._disable_adapters`: a captured class encoder would be captured anew after the first change."""
    layer = next(
        module
        for module in get_peft_model(clip, LoraConfig(target_modules=["q_proj"])).modules()
        if hasattr(module, "lora_A")
    )
    assert layer._disable_adapters is False
    layer.enable_adapters(False)
    assert vars(layer)["_disable_adapters"] is True


ATTRIBUTES = {
    "_attn_implementation": attention_implementation,
    "_version": tensor_version,
    "_parameters": tensors_and_children_of_a_module,
    "_buffers": tensors_and_children_of_a_module,
    "_modules": tensors_and_children_of_a_module,
    "_forward_hooks": hooks_of_a_module,
    "_forward_pre_hooks": hooks_of_a_module,
    "_backward_hooks": hooks_of_a_module,
    "_backward_pre_hooks": hooks_of_a_module,
    "_are_functorch_transforms_active": transforms_of_torch,
    "_current_level": transforms_of_torch,
    "_disable_adapters": disabled_adapters_of_a_layer,
    "_hf_peft_config_loaded": adapter_mark_of_transformers,
    "_raise_exceptions_for_missing_entries": missing_entries,
    "_hf_hook": hooks_of_accelerate,
    "_orig_mod": names_of_wrappers,
    "_checkpoint_wrapped_module": names_of_wrappers,
    "_fsdp_wrapped_module": names_of_wrappers,
}
OTHERS = (
    active_adapter_of_a_layer,
    wrapped_names,
    hooks_of_transformers,
    parts_of_a_text_model,
    components_of_a_pipeline,
)


@pytest.mark.parametrize(
    "check",
    dict.fromkeys([*ATTRIBUTES.values(), *OTHERS]),
    ids=lambda check: check.__name__,
)
def test_the_attribute_is_what_it_was(check, clip):
    try:
        check(clip)
    except Exception as error:
        raise AssertionError(check.__doc__) from error


def test_no_other_private_name_is_used():
    assert imported_names() == IMPORTED.keys()
    assert foreign_attributes() == ATTRIBUTES.keys()
