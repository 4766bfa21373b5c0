"""The command `demo`: shows zero-shot and tuned CLIP side by side in the browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig
from PIL import Image

from clip_prompt_cli.parsers import parse

from .. import AutoModelForPromptClassification, PeftModelForPromptClassification
from ..data.known_datasets import STYLES, load_style
from ..image_files import decode_image, process_images
from ..tuner import ClassifierAdapterConfig
from ..tuner.hub import HubSettings, load_image_processor
from .adapters import base_model_of, find_adapters
from .common import (
    check_extra,
    errors_in_one_line,
    silence_libraries,
    stopped_in_one_line,
    use_one_thread_if_tiny,
)


if TYPE_CHECKING:
    import gradio as gr

DEFAULT_ADAPTERS = Path("outputs/demo")
NUM_LABELS_SHOWN = 5
NUM_EXAMPLES = 7
Probabilities = dict[str, float]


class Comparison:
    """
    One CLIP with several adapters.

    Args:
        base (`str`):
            Hub id or folder of the CLIP.
        adapters (`Mapping[str, str]`):
            The folder of each adapter by name.
        hub (`HubSettings`, *optional*):
            The revision of the CLIP, and so on.

    Raises:
        ValueError: If there are no adapters of classifiers.
    """

    def __init__(self, base: str, adapters: Mapping[str, str], hub: HubSettings | None = None) -> None:
        paths = {name: path for name, path in adapters.items() if is_classifier(path)}
        kinds = {PeftConfig.from_pretrained(path).peft_type.value for path in paths.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"Adapters of several kinds ({', '.join(sorted(kinds))}) do not fit into one model; name those of one."
            )
        if not paths:
            raise ValueError(f"There are no adapters with class names in {', '.join(map(repr, adapters.values()))}.")
        self._classifier = AutoModelForPromptClassification.from_pretrained(base, **(hub.arguments if hub else {}))
        self.image_processor = load_image_processor(self._classifier)
        (first, path), *others = paths.items()
        model = PeftModelForPromptClassification.from_pretrained(self._classifier, path, adapter_name=first)
        for name, path in others:
            model.load_adapter(path, name)
        self._model = model.eval()
        self.class_names = {name: list(config.class_names) for name, config in model.peft_config.items()}
        self._lock = Lock()  # active adapter and class names are state of the model

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, adapter: str, class_names: list[str]
    ) -> tuple[Probabilities, Probabilities]:
        """Returns zero-shot and tuned probabilities by class name.

        Raises:
            ValueError: If the adapter does not take these class names.
        """
        inputs = process_images(self.image_processor, [decode_image(image)])
        with self._lock:
            self._model.set_adapter(adapter)
            self._classifier.set_class_names(class_names)
            tuned = self._model(**inputs).logits[0]  # (C,)
            with self._model.disable_adapter():
                zero_shot = self._model(**inputs).logits[0]  # (C,)
        return tuple(dict(zip(class_names, logits.softmax(dim=0).tolist())) for logits in (zero_shot, tuned))


def is_classifier(path: str) -> bool:
    config = PeftConfig.from_pretrained(path)
    return isinstance(config, ClassifierAdapterConfig) and bool(config.class_names)


def build_demo(comparison: Comparison, examples: list[Image.Image]) -> gr.Blocks:
    """Builds the page."""
    import gradio as gr

    adapters = list(comparison.class_names)

    def names_of(adapter: str) -> str:
        return ", ".join(comparison.class_names[adapter])

    def compare(image: Image.Image | None, adapter: str, names: str):
        if image is None:
            return None, None
        class_names = [name.strip() for name in names.replace("\n", ",").split(",") if name.strip()]
        try:
            return comparison(image, adapter, class_names)
        except ValueError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title="Prompt-tuned CLIP", analytics_enabled=False) as demo:
        gr.Markdown("# Prompt-tuned CLIP\nThe same frozen CLIP twice: as it is, and with learned words in its prompt.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    examples[0],
                    type="pil",
                    image_mode=None,  # as the file has it: decode_image makes RGB of it
                    label="Image",
                    height=240,
                    sources=["upload", "clipboard"],
                    elem_id="image",
                )
                adapter = gr.Dropdown(adapters, value=adapters[0], label="Adapter")
                names = gr.Textbox(names_of(adapters[0]), label="Class names, separated by commas", lines=3)
                button = gr.Button("Classify", variant="primary")
            zero_shot = gr.Label(label="Zero-shot", num_top_classes=NUM_LABELS_SHOWN, elem_id="zero-shot")
            tuned = gr.Label(label="Tuned", num_top_classes=NUM_LABELS_SHOWN, elem_id="tuned")
        gr.Examples([[example] for example in examples], image, label="Pictures that no adapter was tuned on")
        inputs, outputs = [image, adapter, names], [zero_shot, tuned]
        adapter.input(names_of, adapter, names).then(compare, inputs, outputs)
        gr.on([demo.load, image.change, button.click, names.submit], compare, inputs, outputs)
    return demo


def theme() -> gr.themes.Base:
    """Returns a theme with installed fonts only: the demo loads nothing from other servers."""
    import gradio as gr

    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def tuned_on_embedded_pictures(folder: Path) -> dict[str, str]:
    """Tunes an adapter for each of two styles with the command `train`, unless that was done before."""
    adapters = {}
    for style in STYLES[:2]:
        if not (folder / style / "seed1").is_dir():
            command = [sys.executable, "-m", f"{__package__}.train", "--style", style, "--num_seeds", "1"]
            subprocess.run([*command, "--output_dir", folder / style], check=True)
        adapters[style] = str(folder / style / "seed1")
    return adapters


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("demo", arguments)
    silence_libraries(progress_bars=True)
    with stopped_in_one_line(), errors_in_one_line():
        check_extra("demo", "gradio")
        adapters = (
            tuned_on_embedded_pictures(DEFAULT_ADAPTERS) if args.adapters is None else find_adapters(args.adapters)
        )
        base, hub = base_model_of(adapters, args.base, args.base_revision)
        use_one_thread_if_tiny(base)
        comparison = Comparison(base, adapters, hub)
        examples = load_style(STYLES[0])["test"].shuffle(seed=0)[:NUM_EXAMPLES]["image"]
        build_demo(comparison, examples).launch(
            server_name="127.0.0.1",
            server_port=args.port,
            theme=theme(),
            max_file_size="20mb",
            prevent_thread_lock=True,
        )
        Event().wait()  # until Ctrl-C


if __name__ == "__main__":
    main()
