"""Reads the checkpoints of the original authors' code, and writes adapters.

The code of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, IVLP, VPT (MaPLe's repository) and PromptSRC saves a pickle
`model.pth.tar-N`: the `state_dict` of the prompt learner or of the whole model, beside epoch, optimizer and schedule.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from ..families import CLIPForPromptClassification
from ..text.prompts import build_class_prompts
from ..tuner import CLIPPromptTuningConfig


TEXT, VISION = "text_model", "vision_model"
LAYER = r"transformer\.resblocks\.(\d+)\.VPT_shallow"
# Theirs, as a regular expression, and ours; layers are counted from 1 in MaPLe's lists, from 0 in the others.
NAMES = [
    (r"ctx", lambda: f"{TEXT}.embeddings.learnable_embeddings.default"),
    (r"meta_net\.linear1\.(\w+)", lambda kind: f"{TEXT}.embeddings.learnable_meta_in.default.{kind}"),
    (r"meta_net\.linear2\.(\w+)", lambda kind: f"{TEXT}.embeddings.learnable_meta_out.default.{kind}"),
    (r"image_encoder\.VPT", lambda: f"{VISION}.embeddings.learnable_prompts.default"),
    (rf"image_encoder\.{LAYER}", lambda i: f"{VISION}.encoder.layers.{i}.learnable_prompts.default"),
    (rf"text_encoder\.{LAYER}", lambda i: f"{TEXT}.encoder.layers.{i}.learnable_prompts.default"),
    (r"proj\.(\w+)", lambda kind: f"{VISION}.embeddings.learnable_projections.default.{kind}"),
    (
        r"compound_prompts_text\.(\d+)",
        lambda i: f"{TEXT}.encoder.layers.{int(i) + 1}.learnable_prompts.default",
    ),
    (
        r"compound_prompt_projections\.(\d+)\.(\w+)",
        lambda i, kind: f"{VISION}.encoder.layers.{int(i) + 1}.learnable_projections.default.{kind}",
    ),
]


class _Ignored:
    """Stands in for optimizers and schedules: takes whatever it is given, and does nothing."""

    def __setstate__(self, state):
        pass


def _empty_dict(*args) -> dict:
    return {}


# The schedule of these checkpoints holds live objects. None of them is made: their names lead to stand-ins.
STAND_INS = [
    (_Ignored, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (_Ignored, "torch.optim.lr_scheduler.StepLR"),
    (_Ignored, "torch.optim.lr_scheduler.MultiStepLR"),
    (_Ignored, "torch.optim.sgd.SGD"),
    (_Ignored, "torch.optim.adam.Adam"),
    (_Ignored, "torch.optim.adamw.AdamW"),
    (_Ignored, "builtins.dict"),  # the factory of the following
    (_empty_dict, "collections.defaultdict"),
]


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an authors' checkpoint, by their names, without running any code that the pickle may hold.

    Raises:
        ValueError: if the file holds objects beside tensors, optimizers and schedules, or no `state_dict`.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is not read: a pickle can run code when it is opened, and this one holds more than "
            "tensors, optimizers and schedules, or is damaged."
        ) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(torch.is_tensor(value) for value in state_dict.values()):
        raise ValueError(
            f"{str(path)!r} holds no 'state_dict' of tensors, as model.pth.tar-N of the authors' code do."
        )
    return {_plain(name): tensor for name, tensor in state_dict.items()}


def convert_checkpoint(
    path: str | Path,
    base_model_name_or_path: str,
    class_names: Sequence[str] | None = None,
    prompt_template: str = "a photo of a {}.",
    class_token_position: str = "end",
    check_prompts: bool = True,
) -> PeftModel:
    """The classifier of an authors' checkpoint; `save_pretrained` then writes the adapter.

    Args:
        path: `model.pth.tar-N`.
        base_model_name_or_path: the same CLIP in transformers' format.
        class_names: those of the training, in its order. Vectors that are shared by all classes may go without.
        prompt_template: that of the training; with `ctx_init: ""` or random vectors "{}." or any other whose words
            are all replaced.
        class_token_position: `"end"`, `"middle"` or `"front"`, CoOp's CLASS_TOKEN_POSITION.
        check_prompts: compare class names and template with the embeddings of the texts that are saved in the file.

    Raises:
        ValueError: a file of another kind; another base model, template or classes than in training.

    Example:

    ```py
    >>> model = convert_checkpoint("model.pth.tar-5", "openai/clip-vit-base-patch16", ["face", "leopard"])
    >>> model.save_pretrained("maple-caltech")
    ```
    """
    saved = read_checkpoint(path)
    tensors = {ours: saved[theirs].float() for theirs in saved if (ours := _our_name(theirs)) is not None}
    if not tensors:
        raise ValueError(
            f"{str(path)!r} holds no prompts that are known here ('ctx', 'image_encoder.VPT', ...), but "
            f"{sorted(saved)[:5]}."
        )
    base = CLIPForPromptClassification.from_pretrained(base_model_name_or_path, class_names=class_names)
    config = CLIPPromptTuningConfig(
        prompt_template=prompt_template,
        class_token_position=class_token_position,
        class_token_count="alone" if class_token_position != "end" else "in_prompt",
        **_fields(tensors),
    )
    model = get_peft_model(base, config)
    _fill_in(model, tensors)
    if check_prompts and class_names is not None and "token_suffix" in saved:
        _check_prompts(base, saved["token_suffix"].float())
    return model.eval()


def _plain(name: str) -> str:
    # "module." is of DataParallel; the whole models of MaPLe and PromptSRC hold the prompt learner as a part
    return name.removeprefix("module.").removeprefix("prompt_learner.")


def _our_name(theirs: str) -> str | None:
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, theirs):
            return ours(*match.groups())
    return None


def _fields(tensors: dict[str, torch.Tensor]) -> dict:
    """The configuration that the tensors are of."""
    context = tensors.get(f"{TEXT}.embeddings.learnable_embeddings.default")
    num_virtual_tokens = 0 if context is None else context.shape[-2]
    vision = tensors.get(f"{VISION}.embeddings.learnable_prompts.default")
    coupled = f"{VISION}.embeddings.learnable_projections.default.weight" in tensors
    fields = {
        "num_virtual_tokens": num_virtual_tokens,
        "prompt_tuning_init": "RANDOM",
        "class_specific": context is not None and context.ndim == 3,
        "image_conditioned": f"{TEXT}.embeddings.learnable_meta_in.default.weight" in tensors,
        "text_prompt_depth": _depth(tensors, TEXT),
    }
    if coupled or vision is not None:
        fields["num_vision_virtual_tokens"] = num_virtual_tokens if coupled else vision.shape[0]
        fields["vision_prompt_depth"] = _depth(tensors, VISION)
        fields["vision_prompts_from_text"] = coupled
    return fields


def _depth(tensors, tower: str) -> int:
    layers = [re.match(rf"{tower}\.encoder\.layers\.(\d+)\.", name) for name in tensors]
    return 1 + max((int(layer[1]) for layer in layers if layer), default=0)


@torch.no_grad()
def _fill_in(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    parameters = {name.removeprefix("base_model.model."): value for name, value in parameters.items()}
    for name in parameters.keys() | tensors.keys():
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape:
            found, wanted = (tuple(d[name].shape) if name in d else None for d in (tensors, parameters))
            raise ValueError(
                f"The checkpoint's tensor for {name!r} has shape {found}, the base model and its classes ask for "
                f"{wanted}; name the CLIP, and for class-specific vectors the classes, that it was trained with."
            )
        parameters[name].copy_(tensors[name])


def _check_prompts(model: CLIPForPromptClassification, saved: torch.Tensor) -> None:
    """Compares the embeddings of names and full stops, which the authors save, with those of our texts."""
    layout = model.prompt_layout
    texts = build_class_prompts(model.class_names, layout.padded_template, model.tokenizer, max_length=77)
    hint = "give the class names, their order and the template of the training, or check_prompts=False"
    if len(saved) != len(texts.texts):
        raise ValueError(f"The checkpoint is of {len(saved)} classes, but {len(texts.texts)} are given; {hint}.")
    first = 1 + layout.num_virtual_tokens
    table = model.text_model.embeddings.token_embedding.weight.detach().float()
    for text, ids, length, rows in zip(texts.texts, texts.input_ids, texts.attention_mask.sum(dim=1), saved):
        expected = table[ids[first:length]]
        # the authors' code runs in half precision
        if not torch.allclose(expected, rows[: len(expected)], rtol=2e-3, atol=1e-4):
            raise ValueError(f"The checkpoint was not trained with the text {text!r} (or not on this CLIP); {hint}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `clip-prompt-convert`."""
    parser = argparse.ArgumentParser(description="Makes an adapter of a checkpoint of CoOp, MaPLe, PromptSRC, ...")
    parser.add_argument("checkpoint", help="model.pth.tar-N")
    parser.add_argument("output_dir", help="folder for the adapter")
    parser.add_argument("--base_model_name_or_path", required=True, help="the same CLIP, as Hub id or folder")
    parser.add_argument("--class_names", nargs="+", help="those of the training, in its order")
    parser.add_argument("--prompt_template", default="a photo of a {}.", help="that of the training")
    parser.add_argument("--class_token_position", default="end", choices=["end", "middle", "front"])
    parser.add_argument("--no_check", action="store_true", help="do not compare the texts with those of the training")
    args = parser.parse_args(arguments)
    try:
        model = convert_checkpoint(
            args.checkpoint,
            args.base_model_name_or_path,
            class_names=args.class_names,
            prompt_template=args.prompt_template,
            class_token_position=args.class_token_position,
            check_prompts=not args.no_check,
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    model.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir}: {model.get_nb_trainable_parameters()[0]} learned numbers")


if __name__ == "__main__":
    main()
