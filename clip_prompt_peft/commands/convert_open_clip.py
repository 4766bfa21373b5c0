"""The command `convert-open-clip`: a checkpoint of open_clip becomes a folder in the format of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from clip_prompt_cli.parsers import parse

from ..families import classifier_class
from ..open_clip import CONFIG_FILE, find_checkpoint
from ..tuner.hub import HubSettings, load_tokenizer
from .checks import check_base_model
from .common import errors_in_one_line, silence_libraries, stopped_in_one_line
from .outputs import check_can_be_written


NAME = "convert-open-clip"
REMEDY = "Give a checkpoint that has its tokenizer beside it, or put the files of the tokenizer there."


def convert_open_clip(
    name_or_path: str, output_dir: str | os.PathLike, revision: str | None = None, **kwargs
) -> PreTrainedModel:
    """Writes model, tokenizer and image processor of an open_clip checkpoint as transformers writes them.

    Args:
        name_or_path (`str`):
            The folder or Hub id of the checkpoint.
        output_dir (`str` or `os.PathLike`):
            The folder to write, which must not exist or be empty.
        revision (`str`, *optional*):
            The branch, tag or commit on the Hub.
        kwargs:
            Further arguments about the Hub, as of `from_pretrained` (`token`, `cache_dir`, ...).

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        OSError: If the checkpoint cannot be accessed, or holds no weights or no tokenizer.
        ValueError: If the folder is not empty, or the checkpoint is none of open_clip, damaged, or of a model that
            transformers cannot express. Nothing is written then.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(output_dir)!r} is there and is no empty folder; choose another, or remove it first.")
    check_can_be_written(str(target), "OUT")
    hub = HubSettings(revision=revision, **kwargs).pinned(name_or_path)
    checkpoint = find_checkpoint(name_or_path, **hub.arguments)
    if checkpoint is None:
        raise ValueError(
            f"{name_or_path!r} holds no {CONFIG_FILE} that would be needed: it is in the format of transformers "
            "already, or no checkpoint of open_clip."
        )
    config = checkpoint.config
    tokenizer, image_processor = load_tokenizer(name_or_path, hub, REMEDY), checkpoint.image_processor()
    base_class = classifier_class(config).base_class
    model = base_class.from_pretrained(None, config=config, state_dict=checkpoint.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        whole = Path(folder, "whole")
        for part in (model, tokenizer, image_processor):
            part.save_pretrained(whole)
        os.replace(whole, target)  # all of it or nothing
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(NAME, arguments)
    with stopped_in_one_line(), errors_in_one_line():
        silence_libraries()
        check_base_model(options.name_or_path, "NAME")
        model = convert_open_clip(options.name_or_path, options.output_dir, options.revision)
    print(f"Saved {options.output_dir}: a {type(model).__name__} of {model.num_parameters() / 1e6:.0f} M parameters,")
    print("with its tokenizer and image processor. Name the folder where a base model is asked for.")


if __name__ == "__main__":
    main()
