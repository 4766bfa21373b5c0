"""The command `convert`: checkpoints of the original authors' code become adapters."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from clip_prompt_cli.parsers import parse

from ..families import CLIPForPromptClassification
from ..peft_model import without_warning_of_renamed_property
from ..text.prompts import build_class_prompts
from ..tuner import CLIPPromptTuningConfig
from .common import errors_in_one_line, stopped_in_one_line
from .convert_lora import check_metadata, is_lora_file, read_lora


TEXT, VISION = "text_model", "vision_model"
CONTEXT = f"{TEXT}.embeddings.learnable_embeddings.default"
META_NET = f"{TEXT}.embeddings.learnable_meta"
VISION_PROMPTS = f"{VISION}.embeddings.learnable_prompts.default"
COUPLING = f"{VISION}.embeddings.learnable_projections.default"

# The authors' names as regular expressions, and ours. MaPLe's lists start at the second layer, hence "{next_layer}".
LAYER, KIND = r"(?P<layer>\d+)", r"(?P<kind>\w+)"
BLOCK = rf"transformer\.resblocks\.{LAYER}\.VPT_shallow"
NAMES = {
    r"ctx": CONTEXT,
    rf"meta_net\.linear1\.{KIND}": f"{META_NET}_in.default.{{kind}}",
    rf"meta_net\.linear2\.{KIND}": f"{META_NET}_out.default.{{kind}}",
    r"image_encoder\.VPT": VISION_PROMPTS,
    rf"image_encoder\.{BLOCK}": f"{VISION}.encoder.layers.{{layer}}.learnable_prompts.default",
    rf"text_encoder\.{BLOCK}": f"{TEXT}.encoder.layers.{{layer}}.learnable_prompts.default",
    rf"proj\.{KIND}": f"{COUPLING}.{{kind}}",
    rf"compound_prompts_text\.{LAYER}": f"{TEXT}.encoder.layers.{{next_layer}}.learnable_prompts.default",
    rf"compound_prompt_projections\.{LAYER}\.{KIND}": (
        f"{VISION}.encoder.layers.{{next_layer}}.learnable_projections.default.{{kind}}"
    ),
}


class Ignored:
    """A stand-in for optimizers and schedulers that accepts any state and does nothing."""

    def __setstate__(self, state):
        pass


def empty_dict(*args) -> dict:
    return {}


# The saved schedulers are live objects. The names in the pickle lead to these stand-ins, so none of them is created.
STAND_INS = [
    (Ignored, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (Ignored, "torch.optim.lr_scheduler.StepLR"),
    (Ignored, "torch.optim.lr_scheduler.MultiStepLR"),
    (Ignored, "torch.optim.sgd.SGD"),
    (Ignored, "torch.optim.adam.Adam"),
    (Ignored, "torch.optim.adamw.AdamW"),
    (Ignored, "builtins.dict"),  # the factory of the following
    (empty_dict, "collections.defaultdict"),
]


def load_without_code(path: str | Path) -> object:
    """Reads a file that torch has saved, without running any code in the pickle.

    Raises:
        ValueError: If it holds objects other than tensors, optimizers and schedulers.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is not read: a pickle can run code when it is opened, and this one holds more than "
            "tensors, optimizers and schedulers, or is damaged."
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint of prompts by name, see [`load_without_code`].

    Raises:
        ValueError: If the file has no `state_dict`, or is refused.
    """
    return prompt_tensors(load_without_code(path), path)


def prompt_tensors(checkpoint: object, path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors in the `state_dict` of a checkpoint. Raises `ValueError` if there is none."""
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(torch.is_tensor(value) for value in state_dict.values()):
        raise ValueError(f"{str(path)!r} holds no 'state_dict' of tensors, as a model.pth.tar-N does.")
    # "module." comes from DataParallel; whole models of MaPLe and PromptSRC have the prompt learner as a part
    return {
        name.removeprefix("module.").removeprefix("prompt_learner."): tensor for name, tensor in state_dict.items()
    }


def convert_checkpoint(
    path: str | Path,
    base_model_name_or_path: str,
    class_names: Sequence[str] | None = None,
    prompt_template: str = "a photo of a {}.",
    class_token_position: str = "end",
    check_prompts: bool = True,
    revision: str | None = None,
    **kwargs,
) -> PeftModel:
    """Builds the classifier of an authors' checkpoint. Its `save_pretrained` writes the adapter.

    Args:
        path (`str` or `Path`):
            The file `model.pth.tar-N`, or that of CLIP-LoRA, `lora_weights.pt`.
        base_model_name_or_path (`str`):
            Hub id or folder of the same CLIP in the format of transformers.
        class_names (`Sequence[str]`, *optional*):
            The class names of the training, in its order. Not needed for vectors that all classes share, nor for LoRA,
            whose adapter does not hold them.
        prompt_template (`str`, *optional*, defaults to `"a photo of a {}."`):
            The template of the training. CLIP-LoRA has this one. For `ctx_init: ""` or random vectors, `"{}."` or any
            other template whose words are all replaced.
        class_token_position (`str`, *optional*, defaults to `"end"`):
            `"end"`, `"middle"` or `"front"`, CoOp's `CLASS_TOKEN_POSITION`.
        check_prompts (`bool`, *optional*, defaults to `True`):
            Whether to compare class names and template with the token embeddings that are saved in the file.
        revision (`str`, *optional*):
            The revision of the CLIP on the Hub. Its commit is recorded in the adapter.
        kwargs:
            Further arguments of the classifier's `from_pretrained` (`token`, `cache_dir`, ...).

    Raises:
        ValueError: If the file is not such a checkpoint, or belongs to another base model, template or other classes.

    Example:

    ```py
    >>> model = convert_checkpoint("model.pth.tar-5", "openai/clip-vit-base-patch16", ["face", "leopard"])
    >>> model.save_pretrained("maple-caltech")
    ```
    """
    checkpoint = load_without_code(path)
    if is_lora_file(checkpoint):
        metadata = check_metadata(checkpoint, str(path))  # before anything is downloaded
        texts = {"class_names": class_names, "prompt_template": prompt_template}
        base = CLIPForPromptClassification.from_pretrained(
            base_model_name_or_path, revision=revision, **texts, **kwargs
        )
        config, tensors = read_lora(checkpoint, metadata, base, str(path))
        with without_warning_of_renamed_property():
            model = get_peft_model(base, config)
        copy_tensors(tensors, model)
        return model.eval()
    saved = prompt_tensors(checkpoint, path)
    tensors = {ours: saved[theirs].float() for theirs in saved if (ours := our_name(theirs)) is not None}
    if not tensors:
        raise ValueError(
            f"{str(path)!r} holds no prompts that are known here ('ctx', 'image_encoder.VPT', ...), but "
            f"{sorted(saved)[:5]}."
        )
    base = CLIPForPromptClassification.from_pretrained(
        base_model_name_or_path, class_names=class_names, revision=revision, **kwargs
    )
    config = CLIPPromptTuningConfig(
        prompt_template=prompt_template,
        class_token_position=class_token_position,
        class_token_count="in_prompt" if class_token_position == "end" else "alone",
        **config_fields(tensors),
    )
    model = get_peft_model(base, config)
    copy_tensors(tensors, model)
    if check_prompts and class_names is not None and "token_suffix" in saved:
        check_class_prompts(base, saved["token_suffix"].float())
    return model.eval()


def our_name(theirs: str) -> str | None:
    """Returns our name of a tensor, or `None` if it is not a learned one."""
    for pattern, ours in NAMES.items():
        if match := re.fullmatch(pattern, theirs):
            groups = match.groupdict()
            return ours.format(**groups, next_layer=int(groups.get("layer", 0)) + 1)
    return None


def config_fields(tensors: dict[str, torch.Tensor]) -> dict:
    """Returns the fields of the configuration that follow from names and shapes of the tensors."""
    context, vision = tensors.get(CONTEXT), tensors.get(VISION_PROMPTS)
    num_virtual_tokens = 0 if context is None else context.shape[-2]
    coupled = f"{COUPLING}.weight" in tensors
    fields = {
        "num_virtual_tokens": num_virtual_tokens,
        "prompt_tuning_init": "RANDOM",
        "class_specific": context is not None and context.ndim == 3,
        "image_conditioned": f"{META_NET}_in.default.weight" in tensors,
        "text_prompt_depth": prompt_depth(tensors, TEXT),
    }
    if coupled or vision is not None:
        fields["num_vision_virtual_tokens"] = num_virtual_tokens if coupled else vision.shape[0]
        fields["vision_prompt_depth"] = prompt_depth(tensors, VISION)
        fields["vision_prompts_from_text"] = coupled
    return fields


def prompt_depth(tensors: dict[str, torch.Tensor], tower: str) -> int:
    """Returns the number of layers with prompts in a tower."""
    layers = [re.match(rf"{tower}\.encoder\.layers\.(\d+)\.", name) for name in tensors]
    return 1 + max((int(layer[1]) for layer in layers if layer), default=0)


@torch.no_grad()
def copy_tensors(tensors: dict[str, torch.Tensor], model: PeftModel) -> None:
    """Copies the tensors into the model. Raises `ValueError` if names or shapes differ."""
    parameters = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name in parameters.keys() | tensors.keys():
        found, wanted = (tuple(known[name].shape) if name in known else None for known in (tensors, parameters))
        if found is None or found != wanted:
            raise ValueError(
                f"The checkpoint's tensor for {name!r} has shape {found}, the base model and its classes ask for "
                f"{wanted}; name the CLIP, and for class-specific vectors the classes, that it was trained with."
            )
        parameters[name].copy_(tensors[name])


def check_class_prompts(model: CLIPForPromptClassification, saved: torch.Tensor) -> None:
    """Raises `ValueError` if the saved token embeddings of class names and full stops are not those of our texts."""
    layout = model.prompt_layout
    prompts = build_class_prompts(model.class_names, layout.padded_template, model.tokenizer, max_length=77)
    hint = "give the class names, their order and the template of the training, or check_prompts=False"
    if len(saved) != len(prompts.texts):
        raise ValueError(f"The checkpoint is of {len(saved)} classes, but {len(prompts.texts)} are given; {hint}.")
    first = 1 + layout.num_virtual_tokens
    embeddings = model.text_model.embeddings.token_embedding.weight.detach().float()
    lengths = prompts.attention_mask.sum(dim=1)
    for text, ids, length, found in zip(prompts.texts, prompts.input_ids, lengths, saved):
        expected = embeddings[ids[first:length]]
        # the authors' code runs in half precision
        if not torch.allclose(expected, found[: len(expected)], rtol=2e-3, atol=1e-4):
            raise ValueError(f"The checkpoint was not trained with the text {text!r} (or not on this CLIP); {hint}.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(parse("convert", arguments))
    output_dir = options.pop("output_dir")
    with stopped_in_one_line(), errors_in_one_line():
        model = convert_checkpoint(**options)
    model.save_pretrained(output_dir)
    print(f"Saved {output_dir}: {model.get_nb_trainable_parameters()[0]} learned numbers")
    if not isinstance(model.active_peft_config, CLIPPromptTuningConfig):
        print("Load it with AutoModelForPromptClassification.from_pretrained(OUT, class_names=...); it holds no names")


if __name__ == "__main__":
    main()
